"""Models, parts of them and losses that went through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import JDCoreError
from jdcore.graph import reach
from tests.zoo.specimen import IWMTL, IWRM, MTL, Kind, Specimen, check, losses_of

pytestmark = [
    # Dynamo looks at `.grad` of every input, which warns for all that are not leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def _compiled(what: Any) -> Any:
    return torch.compile(what, backend="aot_eager")  # needs no compiler of C++


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


def _whole(net: Any) -> Callable[..., Tensor]:
    model = _compiled(net)
    return lambda _, x: model(x)


def _part(net: Any) -> Callable[..., Tensor]:
    net.norm = _compiled(net.norm)
    return lambda model, x: model(x)


def _loss(_: Any) -> Callable[..., Tensor]:
    loss = _compiled(lambda y: y.square() + y.sin())
    return lambda model, x: loss(model(x))


def _mixing_loss(_: Any) -> Callable[..., Tensor]:
    loss = _compiled(lambda y: y.square() - y.mean(0))
    return lambda model, x: loss(model(x))


def _specimen(compile_some: Callable[[Any], Callable[..., Tensor]]) -> Specimen:
    torch.manual_seed(0)
    net = _Net().double()
    made = Specimen(net, (torch.randn(5, 4, dtype=torch.float64),), outputs=compile_some(net))
    assert any("Compiled" in name for name in reach([losses_of(made)]).nodes.values())
    return made


@pytest.mark.parametrize("kind", [IWRM, IWMTL, MTL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("compile_some", [_whole, _part, _loss])
def test_what_is_compiled_is_served(
    compile_some: Callable[[Any], Callable[..., Tensor]], kind: Kind
) -> None:
    check(_specimen(compile_some), kind, 1e-12)


def test_a_compiled_loss_that_mixes_samples_is_right_or_refused() -> None:
    specimen = _specimen(_mixing_loss)
    check(specimen, MTL, 1e-12)
    with suppress(JDCoreError):
        check(specimen, IWRM, 1e-12)
