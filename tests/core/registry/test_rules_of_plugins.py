"""Gramian rules of real distributions, two of which claim the same layers."""

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
from jdcore.autogram import Engine

def serve(*layers):
    model = torch.nn.Sequential(*layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = Engine(model, batch_dim=0)
    gramian = engine.compute_gramian(model(torch.ones(2, 3)).sum(1))
    table = [line.split()[1] for line in engine.explain().splitlines()[1:]]
    messages = [f"{w.category.__name__}: {w.message}" for w in caught]
    return table, messages, gramian.tolist()
"""

SHIFTED = [[3.0, 3.0], [3.0, 3.0]]


def test_a_rule_of_a_plugin_serves_its_layer(run: Run) -> None:
    table, messages, gramian = run(f"{SERVE}\nresult = serve(Shift(3))", plugins="rule-plugin")

    assert table == ["shift"]
    assert messages == []
    assert gramian == SHIFTED


def test_two_rules_for_one_layer_are_named_and_neither_serves_it(run: Run) -> None:
    table, messages, gramian = run(f"{SERVE}\nresult = serve(Shift(3), Moved(3))", plugins=BOTH)

    assert table == ["operations", "unclaimed"]
    assert gramian == [[6.0, 6.0], [6.0, 6.0]]
    claims = "clashing-rule-plugin:rival and rule-plugin:shift"
    at_discovery, at_use = messages
    assert at_discovery.startswith("PluginWarning: Some jdcore plugins are left out")
    assert f"{claims}: they claim the same layer rule_plugin.shift:Shift." in at_discovery
    assert at_use == (
        f"PluginWarning: {claims} claim the same layer Shift, and none of them serves it. "
        "Choose one with jdcore.register(spec), or switch a distribution off with "
        "JDCORE_DISABLE_PLUGINS."
    )


def test_a_rule_for_a_layer_of_the_core_by_another_path_is_a_clash_too(run: Run) -> None:
    code = f"{SERVE}\njdcore.list_plugins()\nresult = serve(torch.nn.Linear(3, 2))"
    table, [message], _ = run(f"import warnings; warnings.simplefilter('ignore'){code}", BOTH)

    assert table == ["operations"]
    assert message.startswith("PluginWarning: jdcore:linear and clashing-rule-plugin:linear claim")


def test_registering_one_of_them_is_the_choice(run: Run) -> None:
    table, messages, gramian = run(
        f"""
import warnings
warnings.simplefilter("ignore")
[record] = [r for r in jdcore.list_plugins() if r.distribution == "rule-plugin"]
jdcore.register(record.gramian_rules[0])
{SERVE}
result = serve(Shift(3))
""",
        plugins=BOTH,
    )

    assert table == ["shift"]
    assert messages == []
    assert gramian == SHIFTED


def test_switching_one_off_is_a_choice_too(run: Run) -> None:
    table, messages, _ = run(
        f"{SERVE}\nresult = serve(Shift(3), torch.nn.Linear(3, 3))",
        plugins=BOTH,
        JDCORE_DISABLE_PLUGINS="clashing-rule-plugin",
    )

    assert table == ["shift", "linear"]
    assert messages == []


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

    assert "clashing-rule-plugin:rival and rule-plugin:shift" in message
    assert "rule_plugin.shift:Shift" in message


def test_the_rule_of_a_plugin_passes_the_checks(run: Run) -> None:
    checks, failures = run(
        """
import torch
from jdcore.testing import ConformanceError, LayerExample, rule_checks
from rule_plugin.shift import Shift
examples = [
    LayerExample(lambda: Shift(4), lambda n: (torch.randn(n, 4),)),
    LayerExample(lambda: Shift(4), lambda n: (torch.randn(n, 2, 3, 4),), label="4-D"),
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

    assert checks == 26
    assert failures == []
