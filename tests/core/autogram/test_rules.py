from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import GramianRuleSpec, ParameterError, hookimpl
from jdcore._discovery import _specs_of
from jdcore._layers import CORE_RULES
from jdcore._registry import Registry, get_gramian_rule
from jdcore.autogram import Block, Engine, LayerCall, RowsBlock
from jdcore.protocols import GramianRule
from tests.core.autogram.oracle import check_engine, randn

B = 5


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class LayerScaleRule:
    parameters = ("scale",)
    calls = 0

    def refusal(self, module: nn.Module) -> str | None:
        return "too short" if len(module.scale) < 2 else None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        type(self).calls += 1
        scale = call.wanted("scale")
        if scale is not None:
            yield RowsBlock(scale, call.positions(call.grads * call.input, 1).sum(2))


def _spec(**changes: Any) -> GramianRuleSpec:
    fields: dict[str, Any] = {
        "name": "layer_scale",
        "layer": f"{__name__}:LayerScale",
        "rule": f"{__name__}:LayerScaleRule",
        "summary": "Sums of products.",
        "api_version": 1,
    }
    return GramianRuleSpec(**fields | changes)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of its own for what a test registers."""
    own = Registry()
    monkeypatch.setattr("jdcore.autogram._plan.registry", own)
    return own


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), LayerScale(), nn.Linear(6, 3))


def test_a_registered_rule_serves_its_layer(registry: Registry) -> None:
    registry.register(_spec())
    before = LayerScaleRule.calls
    for losses in (lambda m: m(randn(B, 6)).pow(2).sum(1), lambda m: m(randn(B, 4, 6)).sum(1)):
        engine = check_engine(_model, losses, 0)
    assert LayerScaleRule.calls > before
    assert "layer_scale" in engine.explain()


def test_a_rule_that_refuses_a_layer_leaves_it_to_its_operations(registry: Registry) -> None:
    registry.register(_spec())
    layer = LayerScale()
    layer.scale = nn.Parameter(torch.ones(1))
    engine = Engine(layer, batch_dim=0)
    assert "too short" in engine.explain()
    x = randn(B, 1)
    torch.testing.assert_close(engine.compute_gramian(layer(x).squeeze(1)), x @ x.T)


def test_subclasses_are_served_unless_they_override_forward(registry: Registry) -> None:
    registry.register(_spec())

    class Renamed(LayerScale):
        pass

    class Doubled(LayerScale):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    assert [e.spec.name for e in registry.gramian_rules(Renamed)] == ["layer_scale"]
    assert registry.gramian_rules(Doubled) == []
    check_engine(Doubled, lambda m: m(randn(B, 6)).pow(2).sum(1), 0)


def test_a_layer_of_the_core_is_taken(registry: Registry) -> None:
    with pytest.raises(ParameterError, match=r"`layer` must be free, got 'torch.nn:Linear'"):
        registry.register(_spec(layer="torch.nn:Linear"))


def test_a_layer_of_the_core_is_taken_under_every_path(registry: Registry) -> None:
    with pytest.raises(ParameterError, match="taken by jdcore:linear"):
        registry.register(_spec(layer="torch.nn.modules.linear:Linear"))


def test_a_layer_that_was_never_imported_is_no_trouble(registry: Registry) -> None:
    registry.register(_spec(layer="no_such_module:Layer"))
    assert registry.gramian_rules(LayerScale) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layer": "Linear"}, "layer"),
        ({"rule": "a.b"}, "rule"),
        ({"api_version": 0}, "api_version"),
    ],
)
def test_a_spec_with_an_unusable_field_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match=f"`{field}`"):
        _spec(**changes)


@pytest.mark.parametrize("spec", CORE_RULES, ids=lambda spec: spec.name)
def test_rules_of_the_core_satisfy_the_protocol(registry: Registry, spec: GramianRuleSpec) -> None:
    layer = getattr(nn, spec.layer.partition(":")[2])
    [entry] = registry.gramian_rules(layer)
    assert entry.spec is spec
    rule = get_gramian_rule(entry)
    assert isinstance(rule, GramianRule)
    assert rule.__doc__


def test_explain_names_every_module_and_parameter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(6))
            self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Bilinear(6, 6, 6))

    lines = Engine(Model(), batch_dim=0).explain().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["module", "rule"],
        ["net.0", "linear"],
        ["net.2", "operations"],
        ["token", "operations"],
    ]


class _Plugin:
    @hookimpl
    def jdcore_gramian_rules(self) -> Iterator[GramianRuleSpec]:
        yield _spec()
        yield _spec(name="other", layer="a:B")


def test_rules_of_a_plugin_are_collected() -> None:
    assert [s.name for s in _specs_of(_Plugin())["gramian_rules"]] == ["layer_scale", "other"]


def test_a_whole_model_compiled_after_the_engine_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = Engine(model, batch_dim=0)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ParameterError, match=r"torch\.compile"):
        engine.compute_gramian(compiled(randn(B, 6)).pow(2).sum(1))
