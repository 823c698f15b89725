"""The peak of memory under the policy of accelerators, which a budget asks for on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jdcore.autogram import Engine
from tests.benchmarks.autogram import group_norm, mlp, resnet18
from tests.benchmarks.networks import Bert, VisionTransformer
from tests.memory import peak_bytes

BUDGET = 256 << 20  # what an accelerator has

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], float]] = {
    "bert": (lambda: Bert(500, 256, 3, 4), lambda: torch.randint(500, (8, 128)), 1.3),
    "vit": (lambda: VisionTransformer(96, 192, 4, 3), lambda: torch.randn(8, 3, 96, 96), 1.6),
    "convolutions": (lambda: resnet18(group_norm), lambda: torch.randn(4, 3, 32, 32), 1.0),
    "few samples of wide layers": (lambda: mlp(*[512] * 4, 10), lambda: torch.randn(64, 512), 1.4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_little_more_memory_than_a_plain_one(name: str) -> None:
    make, inputs, most = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)  # of tests it is float64
        model, x = make(), inputs()
    engine = Engine(model, batch_dim=0, memory_budget=BUDGET)
    weights = torch.ones(len(x), dtype=torch.float32)

    def losses() -> Tensor:
        return model(x).square().sum(1)

    def peak(step: Callable[[], object]) -> int:
        step()  # what is looked for once, and kept
        model.zero_grad()
        return peak_bytes(step)

    plain = peak(lambda: losses().backward(weights))
    model.zero_grad()
    assert peak(lambda: engine.backward(losses(), lambda _: weights)) <= most * plain
