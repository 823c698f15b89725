"""Shares are added while the backward pass runs, those that a step keeps after it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from jdcore.autogram import Engine
from jdcore.graph import RULES, Jacobian, Outer
from jdcore.graph._memory import Memory
from jdcore.graph._saved import current_pass
from jdcore.graph.shares import Accumulator, Share
from tests.core.autogram.oracle import explicit_jacobian, parameters_of, randn, relative_error
from tests.memory import peak_bytes

B = 4


class _Branches(nn.Module):
    """Layers beside each other, one of them used twice, and one whose result comes last of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(6, 6) for _ in range(3))
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        z = self.shared(torch.tanh(self.left(y))) + self.shared(torch.tanh(self.right(x)))
        return self.head(y + z * self.scale)


def _deep() -> nn.Module:
    layers = [layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers)


def _losses(model: nn.Module) -> Tensor:
    return model(randn(B, 6)).square().sum(1)


@pytest.mark.parametrize("make", [_Branches, _deep, lambda: nn.Linear(6, 2)])
def test_every_step_gives_the_same_gramian(make: Callable[[], nn.Module]) -> None:
    model = make()
    engine = Engine(model, batch_dim=0)
    jacobian = explicit_jacobian(_losses(model), parameters_of([model]))
    for _ in range(3):
        losses = _losses(model)
        for _ in range(2):
            gramian = engine.compute_gramian(losses)
            assert relative_error(gramian, jacobian @ jacobian.T) <= 1e-12


class _Checkpointed(_Branches):
    """The same, whose middle is computed anew in each pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def _images() -> nn.Module:
    convolution = nn.Conv2d(1, 3, 2), nn.GroupNorm(3, 3), nn.ReLU()
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *convolution, nn.Flatten(), nn.Linear(6, 2))


@pytest.mark.parametrize("room", [0, 50, 300, 1 << 20])
@pytest.mark.parametrize("make", [_Branches, _Checkpointed, _deep, _images])
def test_how_many_gradients_may_wait_changes_nothing(
    make: Callable[[], nn.Module], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "waiting", room)
    model = make()
    engine, weights = Engine(model, batch_dim=0), randn(B)
    for _ in range(3):
        jacobian = explicit_jacobian(_losses(model), parameters_of([model]))
        gramian = engine.compute_gramian(_losses(model))
        assert relative_error(gramian, jacobian @ jacobian.T) <= 1e-12
        model.zero_grad()
        engine.backward(_losses(model), lambda gramian: weights)
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert relative_error(found, weights @ jacobian) <= 1e-12


@pytest.mark.parametrize(("room", "none"), [(0, False), (1 << 20, True)])
def test_a_pass_with_small_gradients_needs_no_hooks(
    room: int, none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "waiting", room)
    model = _deep()
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(_losses(model))
    before = RemovableHandle.next_id
    engine.compute_gramian(_losses(model))
    assert (RemovableHandle.next_id == before) == none


def test_the_gradients_of_a_layer_go_before_those_of_the_next_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each of another width, since small layers of one form are served together.
    layers = [nn.Linear(6 + i, 7 + i) for i in range(12)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(_losses(model))
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []
    add = Outer.add_gramian

    def counting(share: Outer, gramian: object) -> None:
        seen.append(weakref.ref(share.grads))
        alive.append(sum(grads() is not None for grads in seen))
        add(share, gramian)

    monkeypatch.setattr(Outer, "add_gramian", counting)
    engine.compute_gramian(_losses(model))
    assert alive == [1] * 12


def test_the_gramian_goes_before_the_gradients_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, gone = _deep(), list[weakref.ref[Tensor]](), list[bool]()
    weighted = Jacobian.weighted

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(weakref.ref(gramian))
        return torch.ones(B)

    def noting(jacobian: Jacobian, *arguments: Any, **options: Any) -> dict[Tensor, Tensor]:
        gone.append(seen[0]() is None)
        return weighted(jacobian, *arguments, **options)

    monkeypatch.setattr(Jacobian, "weighted", noting)
    Engine(model, batch_dim=0).backward(_losses(model), weighting)
    assert gone == [True]


def test_what_a_step_keeps_is_multiplied_once_the_pass_has_freed_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []
    add_share = Accumulator.add_share

    def noting(total: Accumulator, share: Share) -> None:
        passes.append(current_pass())
        add_share(total, share)

    monkeypatch.setattr(Accumulator, "add_share", noting)
    monkeypatch.setattr(Memory, "waiting", 0)  # so that gradients arrive inside of the pass
    model = _deep()
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(_losses(model))
    inside = [number for number in passes if number >= 0]
    assert len(inside) > len(passes) // 2
    passes.clear()
    engine.backward(_losses(model), lambda _: torch.ones(B))
    assert passes
    assert max(passes) < 0


def test_a_perceptron_takes_little_more_memory_than_a_plain_step() -> None:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    model, x = nn.Sequential(*layers).float(), randn(256, 784).float()
    engine, weights = Engine(model, batch_dim=0), torch.full((256,), 1 / 256)

    def plain() -> None:
        losses = model(x).square().mean(1)
        losses.backward(weights)

    def fused() -> None:
        engine.backward(model(x).square().mean(1), lambda _: weights)

    def peak(step: Callable[[], None]) -> int:
        model.zero_grad()
        return peak_bytes(step)

    fused()  # buffers that are kept
    # What frees most goes first, and the largest gradient comes last.
    assert peak(fused) <= 1.2 * peak(plain)


def test_an_error_of_a_rule_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _deep()
    engine = Engine(model, batch_dim=0)
    expected = engine.compute_gramian(_losses(model))
    losses = _losses(model)

    def failing(*_: object) -> None:
        raise LookupError("the rule failed")

    with monkeypatch.context() as patch:
        patch.setitem(RULES, "AddmmBackward0", failing)
        with pytest.raises(LookupError, match="the rule failed"):
            engine.compute_gramian(losses)
        losses.sum().backward(retain_graph=True)
    assert relative_error(engine.compute_gramian(losses), expected) <= 1e-12
