"""
Operations of a step, as a stand-in for launches of kernels on an accelerator.

There, a small operation costs as much as a large one; so the engine is to add few of them to a
plain step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jdcore.autogram import Engine
from tests.benchmarks.autogram import group_norm, mlp, resnet18
from tests.benchmarks.networks import Bert, VisionTransformer
from tests.operations import Operations

# They give memory, or another shape to it, or tell a dtype, and launch nothing.
_FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE |= {"promote_types"}


class _Launches(Operations):
    """Counts what is dispatched, views and allocations aside."""

    def is_counted(self, name: str, function: Any) -> bool:
        return name not in _FREE and not _is_view(function)


def _is_view(function: Any) -> bool:
    """Whether a result shares memory with an operand that is not written to."""
    results = [r.alias_info for r in function._schema.returns]
    return any(info is not None and not info.is_write for info in results)


def operations(step: Callable[[], object]) -> int:
    # The first step may look at what later ones know.
    step()
    with _Launches() as counting:
        step()
    return counting.counts.total()


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(256, 512, 512, 512, 10), lambda: torch.randn(64, 256)),
    "resnet18": (lambda: resnet18(group_norm), lambda: torch.randn(4, 3, 32, 32)),
    "transformer": (_Encoder, lambda: torch.randn(16, 32, 128)),
    "vit": (lambda: VisionTransformer(96, depth=3), lambda: torch.randn(8, 3, 96, 96)),
    "bert": (lambda: Bert(2000, 256, 4, 4), lambda: torch.randint(2000, (8, 64))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_adds_few_operations_to_a_plain_one(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make(), inputs()
    y = torch.randint(10, (len(x),))
    layers = sum(any(True for _ in m.parameters(recurse=False)) for m in model.modules())
    weights = torch.full((len(x),), 1.0 / len(x))
    # With memory in plenty, which is what an accelerator has.
    engine = Engine(model, batch_dim=0, memory_budget=1 << 30)

    def losses() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    def plain() -> None:
        model.zero_grad()
        losses().backward(weights)

    def fused() -> None:
        model.zero_grad()
        engine.backward(losses(), lambda _: weights)

    ordinary = operations(plain)
    assert operations(fused) <= 1.5 * ordinary + 6 * layers
