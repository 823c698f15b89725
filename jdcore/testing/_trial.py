"""What a Gramian rule is tried on: layers, calls of them, and the rows of their Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from jdcore.autogram import Block, LayerCall
from jdcore.autogram._accumulator import Accumulator
from jdcore.autogram._call import widened
from jdcore.autogram._scratch import Scratch
from jdcore.autogram.blocks import Gradients, combined


@frozen(eq=False)
class LayerExample:
    """
    A layer on which a Gramian rule is tried.

    :param make: Makes the layer, with parameters drawn from the default generator. Layers that
        behave differently in training come out in the mode that is meant.
    :param inputs: The positional arguments of its forward for a number of samples, which are the
        first dimension of every Tensor that depends on them. Drawn from the default generator.
    :param label: A name, if the type of the layer says too little.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    label: str = field(default="", kw_only=True)

    def layer(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """A new layer; the same seed gives the same parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(dtype)

    def arguments(
        self, samples: int, dtype: torch.dtype = torch.float64, seed: int = 1
    ) -> tuple[Any, ...]:
        """Arguments for a number of samples, floating tensors in the given dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            arguments = self.inputs(samples)
        converted: tuple[Any, ...] = tree_map(lambda value: _converted(value, dtype), arguments)
        return converted


@frozen(eq=False)
class Trial:
    """
    One call of a layer, as a rule sees it.

    :param call: The call.
    :param jacobian: Its Jacobian in float64, shape [K * B, n] by parameter, from one backward pass
        per row.
    """

    call: LayerCall
    jacobian: dict[Parameter, Tensor]


def make_trial(
    layer: nn.Module,
    arguments: Sequence[Any],
    tasks: int,
    samples: int,
    keywords: Sequence[str] = (),
    used: int | None = None,
) -> Trial:
    """
    Try a layer.

    :param arguments: All of its arguments, those given by keyword last.
    :param keywords: Names of the last of them.
    :param used: The only output that the losses depend on, None if they depend on all.
    """
    dtype = next(layer.parameters()).dtype
    double = copy.deepcopy(layer).double()
    wide = tree_map(lambda value: _converted(value, torch.float64), tuple(arguments))
    outputs = _tensors(_called(double, wide, keywords))
    grads = [_drawn((tasks, *out.shape), dtype) for out in outputs]
    chosen = [i for i in range(len(outputs)) if used in (None, i)]
    positional = len(arguments) - len(keywords)
    detached = tree_map(_detached, tuple(arguments))
    call = LayerCall(
        module=layer,
        args=detached[:positional],
        kwargs=dict(zip(keywords, detached[positional:], strict=True)),
        training=layer.training,
        batch_size=samples,
        output_grads=tuple(widened(g) if i in chosen else None for i, g in enumerate(grads)),
        reached=frozenset(p for p in layer.parameters() if p.requires_grad),
    )
    rows = _rows([outputs[i] for i in chosen], [grads[i].double() for i in chosen], double, samples)
    twins = dict(double.named_parameters())
    own = {twins[name]: p for name, p in layer.named_parameters()}
    return Trial(call, {own[twin]: rows_of_twin for twin, rows_of_twin in rows.items()})


def _rows(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], layer: nn.Module, samples: int
) -> dict[Parameter, Tensor]:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    rows: list[list[Tensor]] = []
    for k in range(len(grads[0])):
        for b in range(samples):
            seeds = [_only(of_output[k], b, samples) for of_output in grads]
            rows.append(dense_gradients(outputs, parameters, seeds))
    columns = zip(*rows, strict=True)
    return {
        p: torch.stack([row.reshape(-1) for row in of_parameter])
        for p, of_parameter in zip(parameters, columns, strict=True)
    }


def dense_gradients(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], seeds: Sequence[Tensor | None]
) -> list[Tensor]:
    """Those of an ordinary backward pass, zeros for unused parameters. The graph is retained."""
    found = torch.autograd.grad(outputs, parameters, seeds, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in pairs]


def _only(grads: Tensor, sample: int, samples: int) -> Tensor:
    size = len(grads) // samples
    masked = torch.zeros_like(grads)
    own = slice(sample * size, (sample + 1) * size)
    masked[own] = grads[own]
    return masked


def gramian_of(blocks: Iterable[Block], rows: int) -> Tensor:
    """The Gramian of blocks, as the engine adds it up."""
    total = Accumulator(rows, torch.device("cpu"), True, Scratch())
    for block in combined(list(blocks)):
        block.add_gramian(total)
    return total.total


def weighted_by(blocks: Iterable[Block], weights: Tensor) -> dict[Parameter, Tensor]:
    """The gradients for weights [K, B], as the engine forms them."""
    gradients = Gradients()
    for block in combined(list(blocks)):
        block.add_weighted(weights.to(block.dtype), gradients)
    return gradients.of


def named_arguments(layer: nn.Module, arguments: Sequence[Any]) -> list[str] | None:
    """What the positional arguments are called, None if some cannot be given by name."""
    names = []
    code = type(layer).forward.__code__
    for position in range(len(arguments)):
        index = position + 1
        if index >= code.co_argcount or index < code.co_posonlyargcount:
            return None
        names.append(code.co_varnames[index])
    return names


def _called(layer: nn.Module, arguments: Sequence[Any], keywords: Sequence[str]) -> Any:
    positional = len(arguments) - len(keywords)
    return layer(
        *arguments[:positional], **dict(zip(keywords, arguments[positional:], strict=True))
    )


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), device="cpu").to(dtype)


def _detached(value: Any) -> Any:
    return widened(value.detach().clone()) if isinstance(value, Tensor) else value


def _converted(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
