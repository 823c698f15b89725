"""
Recording of the forward pass.

The autograd graph is the record: a forward hook leaves what a rule will need in the metadata of the
node that made the output. Nothing else refers to it, so a graph that is dropped takes its records
along, a call that the losses do not depend on is never met, and a plain backward pass pays nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from jdcore.autogram._plan import Plan, Served
from jdcore.errors import ParameterError

_HOOKS: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
"""The hooks of all engines: they leave the value of an output as it is."""


class Record:
    """
    One forward call. Holds no tensor that leads to its own node, else neither would be freed.

    :param served: The module that was called.
    :param args: Its arguments, as its forward hook sees them.
    :param kwargs: Likewise.
    :param outputs: All output tensors.
    """

    __slots__ = (
        "args",
        "kwargs",
        "output_shape",
        "outputs",
        "served",
        "sources",
        "training",
        "versions",
    )

    def __init__(self, served: Served, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        self.served = served
        self.training = served.module.training
        self.output_shape = outputs[0].shape
        self.outputs: list[Tensor] = []
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.sources: frozenset[Node] = frozenset()
        self.versions: list[tuple[Tensor, int]] = []
        if served.rule is None:
            self.outputs = outputs  # what the tap is applied to lies before the node of the record
            return
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            # The common case, made cheap.
            tensors, inputs = args, [args[0].detach()]
            self.args = tuple(inputs)
        else:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.args, self.kwargs = tree_map(_detached, (args, kwargs))
            inputs = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        self.sources = frozenset([_source(t) for t in tensors if t.requires_grad])
        self.versions = [(t, t._version) for t in inputs if not t.is_inference()]

    def modified(self) -> bool:
        """Whether an input was modified in place since the call."""
        # A detached tensor shares the version counter of the original.
        return any(tensor._version != version for tensor, version in self.versions)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _source(tensor: Tensor) -> Node:
    return tensor.grad_fn if tensor.grad_fn is not None else get_gradient_edge(tensor).node


class _Tap(torch.autograd.Function):
    """
    Identity that gives an output a node of its own.

    An in-place operation on a view moves the history of the view past its old node, and with it
    past the record. What a tap returns is no view.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Gate(torch.autograd.Function):
    """Identity on the inputs of a module without a rule, which can be closed to stop gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, key: object) -> Tensor:
        ctx.key, ctx.closed = key, False
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None if ctx.closed else grads[0]), None


def attach(plan: Plan, key: object) -> list[RemovableHandle]:
    """
    Record every call of the served modules from now on.

    :param key: Under which the records lie in the metadata, one per engine.
    """
    handles = [_attach(served, key) for served in plan.served]
    return handles + [_attach_gate(served, key) for served in plan.served if served.rule is None]


def _attach(served: Served, key: object) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if not _intact(served) or not _untouched(served, hook):
            return None
        return _record(served, key, args, kwargs, output)

    _HOOKS.add(hook)
    # First of all hooks: the output as the layer made it is what the rule speaks of.
    return served.module.register_forward_hook(hook, with_kwargs=True, prepend=True)


def _attach_gate(served: Served, key: object) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        gated: dict[int, Tensor] = {}
        return tree_map(lambda value: _gated(value, key, gated), (args, kwargs))

    return served.module.register_forward_pre_hook(hook, with_kwargs=True)


def _gated(value: Any, key: object, gated: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    if id(value) not in gated:  # attention asks whether query, key and value are the same object
        gate: Any = Gate.apply(value, key)  # type: ignore[no-untyped-call]
        gate.version_at_gate = gate._version
        gated[id(value)] = gate
    return gated[id(value)]


def _intact(served: Served) -> bool:
    # torch.func.functional_call and parametrizations run the layer with other tensors.
    if served.rule is None:
        return True
    own = served.module._parameters
    return all(own.get(name) is p for name, p in served.parameters.items() if "." not in name)


def _untouched(served: Served, hook: Callable[..., Any]) -> bool:
    """Whether the output comes from the layer itself: another hook may have run before."""
    if served.rule is None:
        return True
    if _global_forward_hooks:
        return False
    for earlier in served.module._forward_hooks.values():
        if earlier is hook:
            return True
        if earlier not in _HOOKS:
            return False
    return True


def _record(served: Served, key: object, args: Any, kwargs: Any, output: Any) -> Any:
    leaves, structure = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if all(tensor.grad_fn is None for tensor in tensors):
        return None
    _refuse_modified_inputs(served, args, kwargs)
    record = Record(served, args, kwargs, tensors)
    marked = [_mark(tensor, record, index, key) for index, tensor in enumerate(tensors)]
    if all(new is old for new, old in zip(marked, tensors, strict=True)):
        return None
    replacements = iter(marked)
    leaves = [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return leaves[0] if structure is None else tree_unflatten(leaves, structure)


def _mark(tensor: Tensor, record: Record, index: int, key: object) -> Tensor:
    if tensor.grad_fn is None:
        return tensor
    if record.served.rule is None or tensor._is_view():
        tensor = _Tap.apply(tensor)  # type: ignore[no-untyped-call]
    node: Any = tensor.grad_fn
    node.metadata.setdefault(key, []).append((tensor.output_nr, record, index))
    return tensor


def _refuse_modified_inputs(served: Served, args: Any, kwargs: Any) -> None:
    if served.rule is not None:
        return
    for value in tree_leaves((args, kwargs)):
        version = getattr(value, "version_at_gate", None)
        if version is not None and version != value._version:
            raise ParameterError(
                "modules",
                "free of layers without a closed form that modify their input in place",
                f"`{served.label}`, which does",
                "Let it work on a copy, or register a rule for its type.",
            )
