"""Gramians and gradients of a device are those of plain rows, whichever way they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor, nn
from torch.nn import functional as F

import jdcore
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward
from jdcore.graph.shares._share import Accumulator, Addend
from tests.standin.conftest import NAME
from tests.zoo.models import MODELS
from tests.zoo.specimen import (
    IWRM,
    KINDS,
    Kind,
    Specimen,
    check,
    check_against,
    error_of,
    losses_of,
    rows_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")  # some have hooks

# Fused cells, for which the device has no kernel, complex numbers, which it does not know, and
# samples that mix, which may be refused.
NOT_HERE = {
    *("lstm", "lstm_with_projection", "gru", "cells", "packed_sequences", "fourier"),
    "batch_norm_in_training",
}
# Of each kind of operation one, in every run of the tests; the others in long ones.
CHOSEN = [
    *("mlp_on_sequences", "residual", "convolutions", "norms", "transformer", "rnn", "bags"),
    *("tied_embedding", "a_layer_used_thrice", "routed_experts", "graph_network", "checkpoints"),
]
NAMES = [
    pytest.param(name, marks=() if name in CHOSEN else pytest.mark.slow)
    for name in MODELS
    if name not in NOT_HERE
]

AUTOCAST = ["mlp_on_sequences", "residual", "transformer", "tied_embedding", "merged_lora"]


def specimen(name: str, dtype: torch.dtype = torch.float64) -> Specimen:
    with torch.device("cpu"):
        made = MODELS[name]().to(dtype)
    inputs = tuple(x.to(NAME) for x in made.inputs)
    return evolve(made, model=made.model.to(NAME), inputs=inputs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", NAMES)
def test_engines_are_right(name: str, kind: Kind) -> None:
    check(specimen(name), kind, 1e-12)


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_is_near_the_rows_of_autocast(name: str) -> None:
    made = specimen(name, torch.float32)
    rows = rows_of(losses_of(made, IWRM, torch.bfloat16), made.parameters)
    check_against(made, lambda: losses_of(made, IWRM, torch.bfloat16), 0, rows, 2e-2)


# -- autojac ---------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32]


def on_both(run: Any, dtype: torch.dtype) -> None:
    """The ``.jac`` and ``.grad`` of parameters after a step are those of the CPU."""
    found = []
    for device in ("cpu", NAME):
        with torch.device("cpu"):
            torch.manual_seed(0)
            model = nn.Sequential(
                *(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()),
                *(nn.Linear(64, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)),
            ).to(dtype)
            x = torch.randn(5, 2, 6, 6, dtype=dtype)
        with torch.device(device):
            run(model.to(device), x.to(device))
        fields = [t for p in model.parameters() for t in (getattr(p, "jac", None), p.grad)]
        assert all(t.device.type == device for t in fields if t is not None)
        found.append([None if t is None else t.cpu().double() for t in fields])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = torch.cat([t.flatten() for t in found[0] if t is not None])
    got = torch.cat([t.flatten() for t in found[1] if t is not None])
    assert [t is None for t in found[0]] == [t is None for t in found[1]]
    assert error_of(got, expected) <= tolerance


def losses_for(outputs: Tensor) -> list[Tensor]:
    return [*outputs.square().mean(0), (outputs.sin() * 3.0).sum()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 4])
@pytest.mark.parametrize("retain_jac", [False, True])
def test_rows_and_updates(dtype: torch.dtype, chunk_size: int | None, retain_jac: bool) -> None:
    def step(model: nn.Module, x: Tensor) -> None:
        parameters = list(model.parameters())
        backward(losses_for(model(x)), parallel_chunk_size=chunk_size)
        for _ in range(2 if retain_jac else 1):
            jac_to_grad(parameters, jdcore.get_aggregator("upgrad"), retain_jac=retain_jac)

    on_both(step, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_without_rows(dtype: torch.dtype) -> None:
    weighting = jdcore.get_weighting("upgrad")

    def step(model: nn.Module, x: Tensor) -> None:
        gramian_backward(losses_for(model(x)), weighting)
        Engine(model, batch_dim=0).backward(model(x).square().sum(1), weighting)

    on_both(step, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 7])
@pytest.mark.parametrize("deep", [False, True])
def test_rows_of_a_trunk(dtype: torch.dtype, heads: int, deep: bool) -> None:
    def step(model: nn.Module, x: Tensor) -> None:
        assert isinstance(model, nn.Sequential)
        trunk, last = model[:-1], model[-1]
        features = trunk(x)
        with torch.device("cpu"):
            torch.manual_seed(1)
            layers = [nn.Linear(8, 2).to(features) for _ in range(heads)]
        losses = [layer(features).square().mean() for layer in layers]
        losses.append(last(features).sum())
        groups = [[*layer.parameters()] for layer in layers] + [[*last.parameters()]]
        shared = list(trunk.parameters())
        if deep:  # a parameter of the last task that lies in the trunk
            groups[-1].append(shared.pop(0))
        mtl_backward(losses, features, tasks_params=groups, shared_params=shared)
        # One more layer, so that its gradients are compared as well.
        for layer in layers:
            for ours, theirs in zip(layer.parameters(), last.parameters(), strict=True):
                theirs.grad = theirs.grad + ours.grad.sum()  # type: ignore[operator, union-attr]

    on_both(step, dtype)


def test_weights_that_float32_does_not_hold_reach_the_parameters() -> None:
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1e-20, 0.0], [0.0, 1e20]])
    weights = torch.tensor([1e40, 1e-40], dtype=torch.float64)
    Engine(model, batch_dim=0).backward(model(x).squeeze(1), lambda gramian: weights)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1e20, 1e-20]]))


# -- streams ---------------------------------------------------------------------------------------


def test_shares_are_added_up_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), torch.randn(6, 4)
    ours = torch.accelerator.current_stream()
    h, streams = x, [torch.Stream(NAME), ours, torch.Stream(NAME), ours]
    for layer, stream in zip(model, streams, strict=True):
        with stream:
            h = layer(h).tanh()
    losses = h.square().sum(1)
    used: list[torch.Stream] = []
    add_share = Accumulator.add_share

    def noting(self: Accumulator, share: Addend) -> None:
        used.append(torch.accelerator.current_stream())
        add_share(self, share)

    monkeypatch.setattr(Accumulator, "add_share", noting)
    rows = _rows_on_host(losses, list(model.parameters()))
    gramian = Engine(model, batch_dim=0, memory_budget=1).compute_gramian(losses)
    torch.testing.assert_close(gramian.cpu(), rows @ rows.T, rtol=1e-4, atol=1e-5)
    assert used
    assert all(stream == ours for stream in used)


# -- models on two devices -------------------------------------------------------------------------


class _OnTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, device="cpu"), nn.Linear(5, 3, device=NAME)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh().to(NAME)).square()


def _rows_on_host(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.cpu().flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("name", ["upgrad", "mean", "graddrop"])
def test_updates_of_models_on_two_devices(name: str) -> None:
    model, x = _OnTwo(), torch.randn(6, 4, device="cpu")
    parameters, method = list(model.parameters()), jdcore.get_aggregator(name)
    if name == "graddrop":
        method.f = torch.ones_like  # every sign is kept with probability one
    rows = _rows_on_host(model(x).mean(0), parameters)
    backward(model(x).mean(0))
    jac_to_grad(parameters, method)
    update = torch.cat([p.grad.cpu().flatten() for p in parameters])
    torch.testing.assert_close(update, method(rows), rtol=1e-4, atol=1e-6)


def test_engines_refuse_models_on_two_devices() -> None:
    model = _OnTwo()
    losses = model(torch.randn(6, 4, device="cpu")).sum(1)
    message = r"`modules` must be on one device, got tensors on cpu and standin:0\. Use .*backward"
    with pytest.raises(jdcore.ParameterError, match=message):
        Engine(model, batch_dim=0).backward(losses, jdcore.get_weighting("mean"))
    assert all(p.grad is None for p in model.parameters())


class _Moved(nn.Module):
    """A layer whose weight is used on another device, as it is or halved."""

    def __init__(self, device: str, whole: bool) -> None:
        super().__init__()
        self.inner, self.whole = nn.Linear(3, 3, device=device), whole
        self.used = "cpu" if device == NAME else NAME

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight if self.whole else self.inner.weight / 2
        return F.linear(x.to(self.used), weight.to(self.used)).tanh()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("device", ["cpu", NAME])
def test_parameters_that_are_used_on_another_device(device: str, whole: bool) -> None:
    model, x = _Moved(device, whole), torch.randn(6, 3)
    parameters = [model.inner.weight]
    where = " in layer 'inner'" if whole else ""
    with pytest.raises(jdcore.UnservedGraphError, match=f"used on another device{where}"):
        Engine(model, batch_dim=0).backward(model(x).sum(1), jdcore.get_weighting("upgrad"))
    assert parameters[0].grad is None
    rows = _rows_on_host(model(x).sum(1), parameters)
    engine = Engine(model, batch_dim=None)
    gramian = engine.compute_gramian(model(x).sum(1)).cpu()
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-4, atol=1e-5)
    weights = engine.backward(model(x).sum(1), jdcore.get_weighting("upgrad")).cpu()
    update = parameters[0].grad.cpu().flatten()
    torch.testing.assert_close(update, weights @ rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_losses_may_be_on_the_host(batch_dim: int | None) -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    parameters, engine = list(model.parameters()), Engine(model, batch_dim=batch_dim)
    rows = _rows_on_host(model(x).square().sum(1), parameters)
    gramian = engine.compute_gramian(model(x).square().sum(1).cpu())
    assert gramian.is_cpu
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-4, atol=1e-5)
    weights = engine.backward(model(x).square().sum(1).cpu(), jdcore.get_weighting("upgrad"))
    assert weights.is_cpu
    update = torch.cat([p.grad.cpu().flatten() for p in parameters])
    torch.testing.assert_close(update, weights @ rows, rtol=1e-4, atol=1e-5)
