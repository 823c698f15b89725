"""Gramian rules of real distributions, two of which claim the same operation."""

from __future__ import annotations

import pytest

from tests.core.registry.conftest import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.artefacts,
    pytest.mark.xdist_group("installed plugins"),
]

BOTH = "rule-plugin,clashing-rule-plugin"

SERVE = """
import warnings
import torch
from rule_plugin.shift import Shift
from clashing_rule_plugin.moved import Moved
from jdcore import autogram

def serve(function):
    model = torch.nn.Module()
    model.shift = torch.nn.Parameter(torch.zeros(3))
    losses = function.apply(torch.ones(2, 3), model.shift).sum(1)
    engine = autogram.Engine(model, batch_dim=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = engine.explain(losses).splitlines()[1]
    messages = [f"{w.category.__name__}: {w.message}" for w in caught]
    return table.split("  ")[-1], messages, engine.compute_gramian(losses).tolist()
"""

SHIFTED = [[3.0, 3.0], [3.0, 3.0]]


def test_a_rule_of_a_plugin_serves_its_operation(run: Run) -> None:
    rule, messages, gramian = run(f"{SERVE}\nresult = serve(Shift)", plugins="rule-plugin")

    assert rule == "closed form"
    assert messages == []
    assert gramian == SHIFTED


def test_two_rules_for_one_operation_are_named_and_neither_serves_it(run: Run) -> None:
    rule, messages, gramian = run(f"{SERVE}\nresult = serve(Shift)", plugins=BOTH)

    assert rule == "called for each sample"
    assert gramian == SHIFTED
    claims = "clashing-rule-plugin:rival and rule-plugin:shift"
    at_discovery, at_use = messages
    assert at_discovery.startswith("PluginWarning: Some jdcore plugins are left out")
    assert f"{claims}: they claim the same operation rule_plugin.shift:Shift." in at_discovery
    assert "jdcore:AddmmBackward0 and clashing-rule-plugin:products" in at_discovery
    assert at_use == (
        f"PluginWarning: {claims} claim the same operation ShiftBackward, and none of them serves "
        "it. Choose one with jdcore.register(spec), or switch a distribution off with "
        "JDCORE_DISABLE_PLUGINS."
    )


def test_a_function_of_its_own_is_served(run: Run) -> None:
    code = f"{SERVE}\nwarnings.simplefilter('ignore'); jdcore.list_plugins()"
    rule, messages, gramian = run(f"{code}\nresult = serve(Moved)", plugins=BOTH)

    assert (rule, messages, gramian) == ("closed form", [], SHIFTED)


def test_registering_one_of_them_is_the_choice(run: Run) -> None:
    rule, messages, gramian = run(
        f"""
import warnings
warnings.simplefilter("ignore")
[record] = [r for r in jdcore.list_plugins() if r.distribution == "rule-plugin"]
jdcore.register(record.gramian_rules[0])
{SERVE}
result = serve(Shift)
""",
        plugins=BOTH,
    )

    assert (rule, messages, gramian) == ("closed form", [], SHIFTED)


def test_switching_one_off_is_a_choice_too(run: Run) -> None:
    rule, messages, _ = run(
        f"{SERVE}\nresult = serve(Shift)",
        plugins=BOTH,
        JDCORE_DISABLE_PLUGINS="clashing-rule-plugin",
    )

    assert (rule, messages) == ("closed form", [])


def test_strict_plugins_raise_for_a_clash_of_rules(run: Run) -> None:
    message = run(
        """
try:
    jdcore.list_plugins()
except jdcore.PluginError as error:
    result = str(error)
""",
        plugins=BOTH,
        JDCORE_STRICT_PLUGINS="1",
    )

    assert "jdcore:AddmmBackward0 and clashing-rule-plugin:products" in message
    assert "they claim the same operation AddmmBackward0" in message


def test_the_rule_of_a_plugin_passes_the_checks(run: Run) -> None:
    checks, failures = run(
        """
import torch
from jdcore.testing import ConformanceError, OperationExample, rule_checks
from rule_plugin.shift import Shift
operands = lambda: (torch.randn(4),)
examples = [
    OperationExample(Shift.apply, lambda n: (torch.randn(n, 4),), operands),
    OperationExample(Shift.apply, lambda n: (torch.randn(n, 2, 3, 4),), operands, label="4-D"),
]
checks = rule_checks("rule-plugin:shift", *examples)
failures = []
for check in checks:
    try:
        check.run()
    except ConformanceError as error:
        failures.append(f"{check}: {error}")
result = len(checks), failures
""",
        plugins="rule-plugin",
    )

    assert checks == 22
    assert failures == []
