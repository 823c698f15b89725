"""Rules of third parties for operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import GramianRuleSpec, ParameterError, PluginWarning, autogram, hookimpl
from jdcore._discovery import _specs_of
from jdcore._registry import Registry
from jdcore.autogram import Engine, GramianRule, NoRule, Share, Site
from jdcore.errors import UnservedGraphError
from jdcore.graph import RULES
from tests.core.autogram.oracle import (
    check_engine,
    explicit_jacobian,
    parameters_of,
    randn,
    relative_error,
)
from tests.functions import Scale

B = 5


class Renamed(Scale):
    pass


class Doubled(Scale):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return Scale.backward(ctx, 2.0 * grads[0])


uses: list[int] = []


def scale_rule(site: Site, operand: int) -> Share:
    """Sums of products."""
    if operand != 1:
        raise NoRule
    uses.append(operand)
    x, _ = site.node.saved_tensors
    return site.broadcast(site.grad * x, 1)


class _Scaled(nn.Module):
    function: Any = Scale

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.scale)


def _spec(**changes: Any) -> GramianRuleSpec:
    fields: dict[str, Any] = {
        "name": "scale",
        "operation": f"{__name__}:Scale",
        "rule": f"{__name__}:scale_rule",
        "summary": "Sums of products.",
        "steady": True,
        "api_version": 1,
    }
    return GramianRuleSpec(**fields | changes)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of its own for what a test registers."""
    own = Registry()
    monkeypatch.setattr("jdcore.autogram._rules.registry", own)
    uses.clear()
    return own


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), _Scaled(), nn.Linear(6, 3))


def test_a_registered_rule_serves_its_operation(registry: Registry, called: list[str]) -> None:
    registry.register(_spec())
    for losses in (lambda m: m(randn(B, 6)).pow(2).sum(1), lambda m: m(randn(B, 4, 6)).sum((1, 2))):
        check_engine(_model, losses, 0)
    assert uses
    assert called == []


def test_without_it_the_operation_is_called(registry: Registry, called: list[str]) -> None:
    check_engine(_model, lambda m: m(randn(B, 6)).pow(2).sum(1), 0)
    assert set(called) == {"ScaleBackward"}


def scale_rule_of_positive_data(site: Site, operand: int) -> Share:
    """Sums of products."""
    if bool((site.node.saved_tensors[0] < 0).any()):
        raise NoRule
    return scale_rule(site, operand)


def test_a_rule_may_hold_for_some_data_only(registry: Registry, called: list[str]) -> None:
    registry.register(_spec(rule=f"{__name__}:scale_rule_of_positive_data"))
    model = _model()
    engine, parameters = Engine(model, batch_dim=0), parameters_of([model])
    for sign in (1.0, -1.0):
        model.zero_grad()
        losses = model[2](model[1](model[0](randn(B, 6)).sigmoid() * sign)).square().sum(1)
        jacobian = explicit_jacobian(losses, parameters)
        engine.backward(losses, lambda _: torch.ones(B))
        update = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        assert relative_error(update, jacobian.sum(0)) < 1e-12
    assert uses == [1]
    assert called == ["ScaleBackward"]


class OfAPlugin(UnservedGraphError):
    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__("an operation of a plugin", f"it has the number {number}", "Take another.")


def refusing_rule(site: Site, operand: int) -> Share:
    """None."""
    raise OfAPlugin(3)


def test_an_error_of_a_rule_may_be_of_a_class_of_its_own(registry: Registry) -> None:
    registry.register(_spec(rule=f"{__name__}:refusing_rule"))
    model = _model()
    losses = model(randn(B, 6)).square().sum(1)
    with pytest.raises(OfAPlugin, match="it has the number 3") as caught:
        Engine(model, batch_dim=0).compute_gramian(losses)
    assert (caught.value.number, caught.value.parameter) == (3, "output")
    with pytest.raises(OfAPlugin, match="Parameter `losses` must be"):
        autogram.backward(model(randn(B, 6)).square().sum(1), torch.diagonal, batch_dim=0)


def test_subclasses_are_served_unless_they_override_backward(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(_spec())
    assert [e.spec.name for e in registry.gramian_rules("RenamedBackward", Renamed)] == ["scale"]
    assert registry.gramian_rules("DoubledBackward", Doubled) == []
    monkeypatch.setattr(_Scaled, "function", Doubled)
    check_engine(_model, lambda m: m(randn(B, 6)).pow(2).sum(1), 0)


def test_an_operation_of_torch_may_get_one(registry: Registry, called: list[str]) -> None:
    registry.register(_spec(operation="Expm1Backward0", rule=f"{__name__}:scale_rule"))
    assert [e.spec.name for e in registry.gramian_rules("Expm1Backward0", None)] == ["scale"]


def test_operations_of_the_core_are_taken(registry: Registry) -> None:
    for name in ("AddmmBackward0", "ConvolutionBackward0"):
        with pytest.raises(ParameterError, match=f"`operation` must be free, got '{name}', taken"):
            registry.register(_spec(operation=name))


def test_a_function_that_was_never_imported_is_no_trouble(registry: Registry) -> None:
    registry.register(_spec(operation="no_such_module:Function"))
    assert registry.gramian_rules("ScaleBackward", Scale) == []


def test_a_rule_that_cannot_be_loaded_is_left_out(registry: Registry) -> None:
    registry.register(_spec(rule="no_such_module:rule"))
    model = _model()
    with pytest.warns(PluginWarning, match="runtime:scale is left out"):
        gramian = Engine(model, batch_dim=0).compute_gramian(model(randn(B, 6)).sum(1))
    assert gramian.shape == (B, B)


def scale_rule_that_refuses(site: Site, operand: int) -> Share:
    """Nothing."""
    raise UnservedGraphError("a scaling by chance", "it draws numbers", "Seed it.")


def test_a_rule_may_refuse_and_the_layer_is_named(registry: Registry) -> None:
    registry.register(_spec(rule=f"{__name__}:scale_rule_that_refuses"))
    model = _model()
    with pytest.raises(UnservedGraphError, match=r"chance in layer '1' \(_Scaled\): it") as caught:
        Engine(model, batch_dim=0).backward(model(randn(B, 6)).sum(1), torch.diag)
    assert (caught.value.layer, caught.value.remedy) == ("1", "Seed it.")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"operation": "Linear"}, "operation"),
        ({"rule": "a.b"}, "rule"),
        ({"steady": 1}, "steady"),
        ({"api_version": 0}, "api_version"),
    ],
)
def test_a_spec_with_an_unusable_field_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match=f"`{field}`"):
        _spec(**changes)


@pytest.mark.parametrize("name", RULES)
def test_rules_of_the_core_satisfy_the_protocol(name: str) -> None:
    assert isinstance(RULES[name], GramianRule)
    assert RULES[name].__doc__


class _Plugin:
    @hookimpl
    def jdcore_gramian_rules(self) -> Iterator[GramianRuleSpec]:
        yield _spec()
        yield _spec(name="other", operation="a:B")


def test_rules_of_a_plugin_are_collected() -> None:
    assert [s.name for s in _specs_of(_Plugin())["gramian_rules"]] == ["scale", "other"]
