from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from jdcore._fields import disjoint, through_tensor_hooks, write_grads
from jdcore.aggregation import as_weighting
from jdcore.autogram._jacobian import Jacobian
from jdcore.autogram._passes import Objectives
from jdcore.autogram._plan import explanation, make_plan
from jdcore.autogram._probe import Probe
from jdcore.autogram._recording import attach
from jdcore.autogram._scratch import Scratch
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.linalg import unflatten_gramian
from jdcore.validators import describe_tensor


class Engine:
    """
    Computes the Gramian of the Jacobian of losses with respect to the parameters of modules.

    The Jacobian itself is never formed: one backward pass brings the gradients of the losses to the
    output of each layer, and from these and the recorded input a rule for that kind of layer
    computes its share of the Gramian in closed form (`Jacobian Descent for Multi-Objective
    Optimization <https://arxiv.org/pdf/2406.16232>`_, section 6, has the idea layer by layer). With
    :meth:`backward` the weighted gradient comes from the same pass.

    Layers without a rule, and parameters that a module uses directly, are served by the recorded
    graph row by row: right, if slower. :meth:`explain` says what serves what.

    Make the engine before the forward pass: it records the calls of the modules from then on, in
    the autograd graph, where an ordinary backward pass does not notice them. Make it after moving
    the modules to their device, and anew when modules are added or parameters replaced. Reading and
    writing are not synchronised: one engine serves one thread at a time.

    :param modules: The modules whose parameters are meant, all of a model or the shared ones only.
    :param batch_dim: The dimension of samples in the losses, if each loss depends on one sample
        only (instance-wise risk minimization), so that one backward pass serves all samples. None
        if any loss may depend on the whole batch (multi-task learning); then each loss needs a pass
        of its own. With a ``batch_dim``, layers must have samples first, and layers that mix
        samples, such as a BatchNorm in training mode, are refused: the first time that a model is
        seen, a second backward pass checks that samples stay apart.
    :raises ParameterTypeError: If a module is no ``nn.Module``, or ``batch_dim`` no int.
    :raises ParameterError: If a module is wrapped for distributed training or holds distributed or
        uninitialised parameters.

    >>> import torch
    >>> from jdcore.autogram import Engine
    >>> model = torch.nn.Linear(2, 1)
    >>> engine = Engine(model, batch_dim=0)
    >>> losses = model(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).squeeze(1)
    >>> engine.compute_gramian(losses)
    tensor([[2., 1.],
            [1., 5.]])
    """

    def __init__(self, *modules: nn.Module, batch_dim: int | None) -> None:
        if batch_dim is not None and (
            isinstance(batch_dim, bool) or not isinstance(batch_dim, int)
        ):
            raise ParameterTypeError("batch_dim", "an int or None", repr(batch_dim))
        self._batch_dim = batch_dim
        self._plan = make_plan(modules)
        self._key = object()
        self._scratch = Scratch()
        self._probe = Probe()
        # The hooks do not refer to the engine, so that it can go; they go with it.
        weakref.finalize(self, _remove, attach(self._plan, self._key))

    @property
    def batch_dim(self) -> int | None:
        """The dimension of samples in the losses."""
        return self._batch_dim

    def explain(self) -> str:
        """A table of what serves each module or parameter, and why."""
        table = [("module", "rule", "why"), *explanation(self._plan)]
        widths = [max(len(row[column]) for row in table) for column in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in table)

    def compute_gramian(self, output: Tensor, /) -> Tensor:
        """
        Compute the Gramian of the Jacobian of the losses.

        Leaves all ``.grad`` fields and the graph as they are, so that ``output.backward(weights)``
        can follow.

        :param output: The losses, a Tensor of any shape, made by a forward pass that this engine
            saw.
        :returns: Gramian [m, m] for a vector, a scalar for a scalar, the generalized Gramian
            [m1, ..., mk, mk, ..., m1] for any other shape. float64 for float64 losses, else
            float32.
        :raises ParameterTypeError: If the output is no floating Tensor.
        :raises ParameterError: If what was asked for cannot be right: see the class.
        """
        jacobian = self._jacobian(output)
        return _shaped(jacobian.gramian(keep=False, retain_graph=True), output)

    def backward(
        self,
        output: Tensor,
        weighting: Callable[[Tensor], Tensor],
        /,
        *,
        retain_graph: bool = False,
    ) -> Tensor:
        """
        Compute the Gramian, weigh it, and add the weighted gradients to the ``.grad`` fields.

        Does what ``gramian = engine.compute_gramian(output)``, ``weights = weighting(gramian)`` and
        ``output.backward(weights)`` do, up to rounding, for the price of about one backward pass.
        All leaves that ``output.backward`` would reach get their gradient, also those outside of
        the modules of this engine.

        :param output: As for :meth:`compute_gramian`.
        :param weighting: A :class:`~jdcore.Weighting` for a vector of losses, a
            :class:`~jdcore.GeneralizedWeighting` for any other shape.
        :param retain_graph: Whether to keep the graph for another backward pass.
        :returns: The weights, of the shape of the losses.
        :raises ParameterError: As :meth:`compute_gramian`, or if the weighting does not fit. No
            ``.grad`` field is changed then.
        """
        chosen = as_weighting(weighting)
        jacobian = self._jacobian(output)
        gramian = _shaped(jacobian.gramian(keep=True, retain_graph=retain_graph), output)
        weights = _weigh(chosen, gramian, output)
        del gramian
        gradients = jacobian.weighted(weights.detach(), retain_graph)
        own = dict(zip(gradients, disjoint(gradients.values()), strict=True))
        write_grads(through_tensor_hooks(own))
        return weights

    def _jacobian(self, output: Tensor) -> Jacobian:
        objectives = Objectives(output, _checked_dim(output, self._batch_dim))
        return Jacobian(objectives, self._plan, self._key, self._scratch, self._probe)


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _checked_dim(output: Tensor, batch_dim: int | None) -> int | None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ParameterTypeError("output", "a floating Tensor", describe_tensor(output))
    if output.grad_fn is None:
        raise ParameterError(
            "output",
            "the result of differentiable operations",
            "a Tensor without a graph",
            "Compute it with gradients enabled, after making the engine.",
        )
    if batch_dim is None:
        return None
    if not -output.ndim <= batch_dim < output.ndim:
        raise ParameterError("batch_dim", f"a dimension of {describe_tensor(output)}", batch_dim)
    return batch_dim % output.ndim


def _shaped(total: Tensor, output: Tensor) -> Tensor:
    dtype = output.dtype if output.dtype == torch.float64 else torch.float32
    total = total.to(dtype)
    return total if output.ndim == 1 else unflatten_gramian(total, output.shape)


def _weigh(weighting: Callable[[Tensor], Tensor], gramian: Tensor, output: Tensor) -> Tensor:
    shape = list(output.shape)
    hint = None
    if output.ndim != 1:
        hint = f"Losses of shape {shape} need a GeneralizedWeighting: Flattening(weighting)."
    try:
        weights = weighting(gramian)
    except ParameterError as error:
        if hint is None or error.parameter != "gramian":
            raise
        got = f"one that refuses a Gramian of shape {list(gramian.shape)}"
        raise ParameterError("weighting", f"made for losses of shape {shape}", got, hint) from error
    if not isinstance(weights, Tensor) or weights.shape != output.shape:
        expected = f"one that gives weights of shape {shape}, as the losses"
        raise ParameterError("weighting", expected, describe_tensor(weights), hint)
    return weights
