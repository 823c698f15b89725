"""The checks of Gramian rules catch what they promise to catch: each saboteur breaks one law."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jdcore
from jdcore import GramianRuleSpec, UnknownNameError
from jdcore.autogram import Block, LayerCall, RowsBlock
from jdcore.testing import ConformanceError, LayerExample, gramian_rule_tests, rule_checks


class Affine(nn.Module):
    """Scale and shift of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Honest:
    """Sums over positions."""

    parameters = ("scale", "shift")

    def refusal(self, module: nn.Module) -> str | None:
        return "one feature only" if len(module.scale) == 1 else None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        scale, shift = call.wanted("scale"), call.wanted("shift")
        if scale is not None:
            yield RowsBlock(scale, call.positions(call.grads * call.input, 1).sum(2))
        if shift is not None:
            yield RowsBlock(shift, call.positions(call.grads, 1).sum(2))


class WrongByPositions(Honest):
    """Forgets all but the first position of a sample."""

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        scale, shift = call.module.scale, call.module.shift
        yield RowsBlock(scale, call.positions(call.grads * call.input, 1)[:, :, 0])
        yield RowsBlock(shift, call.positions(call.grads, 1)[:, :, 0])


class Imprecise(Honest):
    """Rounds to half precision on the way."""

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        for block in super().blocks(call):
            [(parameter, _)] = block.columns
            yield RowsBlock(parameter, block._rows.bfloat16().to(block.dtype))


class Insatiable(Honest):
    """Serves parameters that nobody wants."""

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        yield RowsBlock(call.module.scale, call.positions(call.grads * call.input, 1).sum(2))
        yield RowsBlock(call.module.shift, call.positions(call.grads, 1).sum(2))


class Positional(Honest):
    """Takes its argument by position only."""

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        assert len(call.args) == 1
        return super().blocks(call)


class Overwriting(Honest):
    """Multiplies the gradients in place."""

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        shift, scale = call.wanted("shift"), call.wanted("scale")
        if shift is not None:
            yield RowsBlock(shift, call.positions(call.grads, 1).sum(2))
        if scale is not None:
            yield RowsBlock(scale, call.positions(call.grads.mul_(call.input), 1).sum(2))


class Calling(Honest):
    """Runs the layer once more."""

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        call.module(call.input.to(call.module.scale.dtype))
        return super().blocks(call)


class Remembering(Honest):
    """Adds what it saw before."""

    total = 1.0

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        type(self).total += 1.0
        for block in super().blocks(call):
            [(parameter, _)] = block.columns
            yield RowsBlock(parameter, block._rows * self.total)


class HalfNamed(Honest):
    """Does not know all parameters."""

    parameters = ("scale",)


class Refusing(Honest):
    """Refuses everything."""

    def refusal(self, module: nn.Module) -> str | None:
        return "not today"


class Vague(Honest):
    """Answers a question of cost with a number."""

    def beats_rows(self, *_: Any) -> Any:
        return 1


class Mixing(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def _example(layer: type[nn.Module] = Affine) -> LayerExample:
    return LayerExample(layer, lambda n: (torch.randn(n, 3, 4),))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(rule: type, layer: type = Affine) -> str:
        own = jdcore._registry.Registry()
        for module in (
            "jdcore.autogram._plan",
            "jdcore.testing._rules",
            "jdcore.testing._rule_laws",
        ):
            monkeypatch.setattr(f"{module}.registry", own)
        own.register(
            GramianRuleSpec(
                name="affine",
                layer=f"{__name__}:{layer.__name__}",
                rule=f"{__name__}:{rule.__name__}",
                summary="For this test.",
                api_version=1,
            )
        )
        return "runtime:affine"

    return register


def _failures(rule: str, *examples: LayerExample) -> set[str]:
    found = set()
    for check in rule_checks(rule, *examples):
        try:
            check.run()
        except ConformanceError:
            found.add(check.check.__name__)
    return found


def test_an_honest_rule_passes_every_check(registered: Any) -> None:
    assert _failures(registered(Honest), _example()) == set()


@pytest.mark.parametrize(
    ("saboteur", "expected"),
    [
        (WrongByPositions, "agrees_with_backward_passes"),
        (Imprecise, "agrees_in_lower_precision"),
        (Insatiable, "serves_only_what_is_wanted"),
        (Positional, "takes_arguments_by_keyword"),
        (Overwriting, "changes_nothing"),
        (Calling, "changes_nothing"),
        (Remembering, "has_no_state"),
        (HalfNamed, "satisfies_the_protocol"),
        (Refusing, "serves_the_layer"),
        (Vague, "estimates_its_cost"),
    ],
)
def test_each_saboteur_is_caught(registered: Any, saboteur: type, expected: str) -> None:
    assert expected in _failures(registered(saboteur), _example())


def test_a_layer_that_mixes_samples_is_no_fault_of_the_rule(registered: Any) -> None:
    rule = registered(Honest, Mixing)
    [check] = [
        c for c in rule_checks(rule, _example(Mixing)) if c.check.__name__ == "keeps_samples_apart"
    ]
    with pytest.raises(ConformanceError, match="the layer mixes samples, so no rule can serve it"):
        check.run()


def test_refused_layers_are_checked(registered: Any) -> None:
    def narrow() -> nn.Module:
        layer = Affine()
        layer.scale, layer.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        return layer

    refused, served = LayerExample(narrow, lambda n: (torch.randn(n, 1),)), _example()
    rule = registered(Honest)
    rule_checks(rule, served, refused=[refused])[-1].run()
    with pytest.raises(ConformanceError, match="refusal gives None"):
        rule_checks(rule, served, refused=[served])[-1].run()


def test_a_check_says_which_rule_and_which_layer(registered: Any) -> None:
    first = rule_checks(registered(Honest), _example())[0]
    assert str(first) == "runtime:affine-Affine-satisfies_the_protocol"


def test_errors_name_what_was_wrong(registered: Any) -> None:
    rule = registered(WrongByPositions)
    checks = {c.check.__name__: c for c in rule_checks(rule, _example())}
    with pytest.raises(ConformanceError, match=r"the Gramian, 1 tasks, 5 samples of 1: error \d"):
        checks["agrees_with_backward_passes"].run()


def test_a_rule_that_is_not_there_and_one_without_examples() -> None:
    with pytest.raises(UnknownNameError, match=r"No Gramian rule is registered under the name"):
        gramian_rule_tests("jdcore:linaer", _example())
    with pytest.raises(ConformanceError, match="without an example of its layer"):
        gramian_rule_tests("jdcore:linear")
