"""What the zoo keeps, the losses that are put on it, and the truth about them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from jdcore.autogram import Engine


def _call(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(*inputs)


@define
class Specimen:
    """
    A model and a batch of inputs.

    :param outputs: Gives the outputs, samples first, from the model and the inputs.
    :param mixes: Whether one sample changes the losses of another, so that an engine with a
        ``batch_dim`` may be right or refuse.
    :param single: What float32 may differ from float64, as part of the whole.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: Callable[..., Tensor] = field(default=_call, kw_only=True)
    mixes: bool = field(default=False, kw_only=True)
    single: float = field(default=1e-6, kw_only=True)

    def to(self, dtype: torch.dtype) -> Specimen:
        """A copy in another precision."""
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)
        model = copy.deepcopy(self.model).to(dtype)
        return Specimen(model, inputs, outputs=self.outputs, mixes=self.mixes, single=self.single)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def first_task(outputs: Tensor) -> Tensor:
    """[B]: neither linear nor symmetric in the outputs."""
    y = outputs.flatten(1)
    return (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).sum(1) + y.square().mean(1)


def second_task(outputs: Tensor) -> Tensor:
    return (outputs.flatten(1) + 0.5).sin().mean(1)


@define(frozen=True)
class Kind:
    """How losses are made from outputs, and where their samples are."""

    name: str
    batch_dim: int | None
    of: Callable[[Tensor], Tensor]


def _tasks(y: Tensor) -> Tensor:
    return torch.stack([first_task(y).mean(), second_task(y).sum(), first_task(y[1:]).sum()])


IWRM = Kind("iwrm", 0, first_task)
IWMTL = Kind("iwmtl", 0, lambda y: torch.stack([first_task(y), second_task(y)], 1))
TASKS_FIRST = Kind("tasks-first", 1, lambda y: torch.stack([first_task(y), second_task(y)]))
MTL = Kind("mtl", None, _tasks)
KINDS = [IWRM, IWMTL, TASKS_FIRST, MTL]


def losses_of(specimen: Specimen, kind: Kind = IWRM, autocast: torch.dtype | None = None) -> Tensor:
    """The losses of one forward pass; random numbers are the same in all of them."""
    torch.manual_seed(1)
    device = specimen.inputs[0].device.type
    context: Any = torch.autocast(device, autocast) if autocast else nullcontext()
    with context:
        outputs = specimen.outputs(specimen.model, *specimen.inputs)
    return kind.of(outputs.float() if autocast else outputs)


def rows_of(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """[m, n] in float64: one plain gradient per loss, parameters out of reach as zeros."""
    rows = []
    for loss in losses.reshape(-1):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense()
            for g, p in zip(found, parameters, strict=True)
        ]
        rows.append(torch.cat([g.reshape(-1).double() for g in dense]))
    return torch.stack(rows)


def gathered(parameters: Sequence[Tensor]) -> Tensor:
    """What is in the ``.grad`` fields, as a vector [n] in float64."""
    fields = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    return torch.cat([g.reshape(-1).double() for g in fields])


def cleared(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.grad = None


def as_matrix(gramian: Tensor, ndim: int) -> Tensor:
    """[m1, ..., mk, mk, ..., m1] as [m, m]."""
    order = [*range(ndim), *reversed(range(ndim, 2 * ndim))]
    m = gramian.shape[:ndim].numel()
    return gramian.permute(order).reshape(m, m)


def error_of(got: Tensor, expected: Tensor) -> float:
    """The relative error; infinite if zeros are missed, NaN for NaN, so that `<=` tells all."""
    difference = (got.double() - expected.double()).norm()
    return 0.0 if difference == 0 else float(difference / expected.double().norm())


def weights_for(losses: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(2)
    return torch.randn(losses.shape, generator=generator, device="cpu").to(losses)


def check(specimen: Specimen, kind: Kind, tolerance: float, truth: Specimen | None = None) -> None:
    """
    The Gramian and the fused gradient of an engine against rows by plain backward passes.

    :param truth: The same specimen in the precision of the rows; by default in its own.
    """
    exact = losses_of(truth or specimen, kind)
    rows = rows_of(exact, (truth or specimen).parameters)
    check_against(specimen, lambda: losses_of(specimen, kind), kind.batch_dim, rows, tolerance)


def check_against(
    specimen: Specimen,
    losses: Callable[[], Tensor],
    batch_dim: int | None,
    rows: Tensor,
    tolerance: float,
) -> None:
    parameters = specimen.parameters
    engine = Engine(specimen.model, batch_dim=batch_dim)
    output = losses()
    gramian = engine.compute_gramian(output)
    assert gramian.shape == (*output.shape, *reversed(output.shape))
    assert error_of(as_matrix(gramian, output.ndim), rows @ rows.T) <= tolerance
    assert all(p.grad is None for p in parameters)

    weights = weights_for(output)
    update = weights.double().reshape(-1) @ rows
    seen = []
    engine.backward(losses(), lambda g: (seen.append(g), weights)[1])
    assert error_of(as_matrix(seen[0], output.ndim), rows @ rows.T) <= tolerance
    assert error_of(gathered(parameters), update) <= tolerance
    cleared(parameters)
    # The graph whose Gramian was asked for is as it was.
    output.backward(weights)
    assert error_of(gathered(parameters), update) <= tolerance
    cleared(parameters)
