"""The commands that list, describe and examine, on methods registered for these tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

import jdcore
from jdcore import AggregatorSpec, GramianRuleSpec, Property, Reference, ScalarizerSpec
from jdcore._commands import _records
from jdcore._discovery import PluginRecord
from jdcore.aggregation import GramianWeighting
from jdcore.cli import main
from jdcore.validators import real

Array = NDArray[np.float64]


@define(eq=False)
class EvenWeighting(GramianWeighting):
    """
    Equal weights, see :class:`EvenWeighting <somewhere>` and `a paper
    <https://example.org/even>`_.

    :param total: What the weights
        sum to.

    >>> EvenWeighting()
    EvenWeighting(total=1.0)
    """

    total: float = field(default=1.0, validator=real(0.0))

    def compute(self, gramian: Array) -> Array:
        return np.full(len(gramian), self.total / len(gramian))


class MuteWeighting(GramianWeighting):
    def compute(self, gramian: Array) -> Array:
        return np.ones(len(gramian))


@define(eq=False)
class BrokenWeighting(GramianWeighting):
    """Fails at every call."""

    def compute(self, gramian: Array) -> Array:
        raise ZeroDivisionError("by nothing")


@define(eq=False)
class UnbuildableWeighting(GramianWeighting):
    """Fails when it is made."""

    def __attrs_post_init__(self) -> None:
        raise OSError("no license server")


@define(eq=False)
class LeavingWeighting(GramianWeighting):
    """Ends the program, as some do without a license."""

    def compute(self, gramian: Array) -> Array:
        raise SystemExit("no license")


class Total:
    """The sum of the losses."""

    def __call__(self, losses: Tensor) -> Tensor:
        return losses.sum()


class Endless(Total):
    """A sum without bound."""

    def __call__(self, losses: Tensor) -> Tensor:
        return losses.sum() / 0.0


class Detached(Total):
    """Nothing that could be trained."""

    def __call__(self, losses: Tensor) -> Tensor:
        return losses.detach().sum()


@pytest.fixture(autouse=True)
def _fresh_registry() -> Any:
    """The registry of these tests, without what other tests have registered."""
    own = jdcore._registry.registry
    tables: list[dict[str, Any]] = [*own._runtime.values(), own._runtime_rules]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    jdcore.refresh()
    register("even", "EvenWeighting", requires=("no-such-distribution",))
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
    jdcore.refresh()


def register(name: str, weighting: str, **fields: Any) -> None:
    jdcore.register(
        AggregatorSpec(
            name=name,
            summary="Equal weights.",
            weighting=f"{__name__}:{weighting}",
            properties=(Property.PERMUTATION_INVARIANT,),
            reference=Reference(title="A paper", year=2024, url="https://example.org/even"),
            api_version=1,
            **fields,
        )
    )


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(argv)
    return code, capsys.readouterr().out


def test_listing_as_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(capsys, "list", "--json")
    [record] = [r for r in json.loads(printed) if r["name"] == "even"]

    assert code == 0
    assert record == {
        "name": "even",
        "class_name": "Even",
        "summary": "Equal weights.",
        "input": "gramian",
        "losses": False,
        "wrapper": False,
        "properties": ["permutation_invariant"],
        "stateful": False,
        "stochastic": False,
        "min_rows": 1,
        "aliases": [],
        "reference": {"title": "A paper", "year": 2024, "url": "https://example.org/even"},
        "requires": ["no-such-distribution"],
        "distribution": "runtime",
        "version": None,
        "installed": False,
        "install": "pip install no-such-distribution",
    }


def test_methods_of_known_distributions_are_listed_with_the_command_that_installs_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_records, "METHODS", {"more-methods": ("even", "odd")})

    records = json.loads(run(capsys, "list", "--json")[1])
    text = run(capsys, "list")[1]

    assert [r for r in records if r["distribution"] == "more-methods"] == [
        {
            "name": "odd",
            "installed": False,
            "distribution": "more-methods",
            "install": "pip install more-methods",
        }
    ]
    assert "not installed: pip install more-methods" in text


def test_in_a_pipe_a_table_is_plain_text_with_one_line_per_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run(capsys, "list")[1].splitlines()

    assert lines[0].split()[:2] == ["name", "input"]
    [line] = [line for line in lines if line.startswith("even ")]
    assert line.endswith("Equal weights. Needs: pip install no-such-distribution")


@pytest.mark.parametrize(
    "command", [["list"], ["list", "--json"], ["plugins"], ["plugins", "--json"]]
)
def test_commands_that_only_read_specs_do_not_import_torch(command: list[str]) -> None:
    code = (
        f"import sys; from jdcore.cli import main; main({command}); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr == "False\n"


def test_info_shows_parameters_with_types_defaults_and_descriptions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed = run(capsys, "info", "EVEN")

    assert code == 0
    assert "total: float = 1.0\n    What the weights sum to.\n" in printed
    assert "check_finite: bool | None = None\n    Whether NaN or infinite" in printed
    assert "paper:       A paper (2024), https://example.org/even\n" in printed
    assert "Equal weights, see EvenWeighting and a paper (https://example.org/even)." in printed


def test_info_of_a_method_without_docstring_shows_no_other_docstring(
    capsys: pytest.CaptureFixture[str],
) -> None:
    register("mute", "MuteWeighting")

    assert json.loads(run(capsys, "info", "mute", "--json")[1])["doc"] == ""
    assert run(capsys, "info", "mute")[1].endswith("else no.\n")


def test_info_as_json_adds_parameters_and_solvers_to_the_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = json.loads(run(capsys, "info", "even", "--json")[1])

    assert record["parameters"][0] == {
        "name": "total",
        "type": "float",
        "required": False,
        "default": "1.0",
        "description": "What the weights sum to.",
    }
    assert (record["problem"], record["solvers"]) == (None, [])
    assert record["doc"].startswith("Equal weights")


@pytest.mark.parametrize("command", ["info", "check"])
def test_an_unknown_method_is_one_line_and_exit_code_2(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([command, "evne"])

    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jdcore {command}: No aggregator is registered under the name 'evne'.")
    assert error.count("\n") == 1


def test_check_of_a_method_that_cannot_be_imported_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    register("missing", "NoSuchWeighting")

    code, printed = main(["check", "missing"]), capsys.readouterr()

    assert (code, printed.out) == (2, "")
    assert "has no attribute 'NoSuchWeighting'" in printed.err
    assert printed.err.count("\n") == 1


def test_check_reports_every_check_and_succeeds_for_an_honest_method(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed = run(capsys, "check", "even")

    assert code == 0
    assert "passed   is_permutation_invariant\n" in printed
    assert "failed" not in printed


def test_check_fails_for_a_method_that_breaks_its_promises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for weighting, trouble in (
        ("BrokenWeighting", "ZeroDivisionError: by nothing"),
        ("LeavingWeighting", "SystemExit: no license"),
    ):
        register("broken", weighting)

        code, printed = run(capsys, "check", "broken")

        assert code == 1
        assert f"failed   is_deterministic: {trouble}\n" in printed


def test_the_doctor_is_content_with_a_method_that_works(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed = run(capsys, "doctor", "--json")
    report = json.loads(printed)
    [trial] = [t for t in report["trials"] if t["method"] == "even"]

    assert code == 0
    assert report["troubles"] == []
    assert trial["trouble"] is None
    assert trial["milliseconds"] > 0.0
    assert report["versions"]["no-such-distribution"] == "not installed"
    assert report["versions"]["Python"].startswith("3.")


@pytest.mark.parametrize(
    ("weighting", "trouble"),
    [
        ("BrokenWeighting", "ZeroDivisionError: by nothing"),
        ("UnbuildableWeighting", "OSError: no license server"),
        ("LeavingWeighting", "SystemExit: no license"),
        ("MissingWeighting", "PluginError: Plugin runtime:sick cannot be used: "),
    ],
)
def test_the_doctor_names_what_is_broken_goes_on_and_exits_with_1(
    weighting: str, trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register("sick", weighting)

    code, printed = run(capsys, "doctor")

    assert code == 1
    assert f"Broken: sick: {trouble}" in printed
    [line] = [line for line in printed.splitlines() if line.startswith("even ")]
    assert line.endswith("ok")


class Nothing:
    """Lacks a return."""

    def __call__(self, matrix: Tensor, /) -> None: ...


def test_the_doctor_tells_what_comes_in_place_of_a_tensor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    factory = f"{__name__}:Nothing"
    jdcore.register(
        AggregatorSpec(name="nothing", summary="Nothing.", aggregator=factory, api_version=1)
    )

    assert "nothing: TypeError: the result is a NoneType, no Tensor" in run(capsys, "doctor")[1]


def register_scalarizer(name: str, scalarizer: str) -> None:
    jdcore.register(
        ScalarizerSpec(
            name=name, summary="A sum.", scalarizer=f"{__name__}:{scalarizer}", api_version=1
        )
    )


def test_the_doctor_tries_scalarizers_too(capsys: pytest.CaptureFixture[str]) -> None:
    register_scalarizer("total", "Total")

    code, printed = run(capsys, "doctor", "--json")
    [trial] = [t for t in json.loads(printed)["trials"] if t["method"] == "total"]

    assert code == 0
    assert (trial["kind"], trial["solver"], trial["trouble"]) == ("scalarizer", None, None)
    assert trial["milliseconds"] > 0.0


@pytest.mark.parametrize(
    ("scalarizer", "trouble"),
    [
        ("Endless", "ArithmeticError: the result is not finite"),
        ("Detached", "RuntimeError: element 0 of tensors does not require grad"),
        ("Missing", "PluginError: Plugin runtime:sick cannot be used: "),
    ],
)
def test_the_doctor_names_scalarizers_that_are_broken(
    scalarizer: str, trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register_scalarizer("sick", scalarizer)

    code, printed = run(capsys, "doctor")

    assert code == 1
    assert f"Broken: scalarizer sick: {trouble}" in printed


def register_rule(name: str, operation: str, rule: str = "Total") -> None:
    jdcore.register(
        GramianRuleSpec(
            name=name,
            operation=operation,
            rule=f"{__name__}:{rule}",
            summary="For these tests.",
            api_version=1,
        )
    )


class Fused(torch.autograd.Function):
    """Stands for an operation of a plugin."""


def test_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    register_rule("fused", f"{__name__}:Fused")

    code, printed = run(capsys, "list", "--rules")
    _, as_json = run(capsys, "list", "--rules", "--json")

    assert code == 0
    expected = ["fused", f"{__name__}:Fused", "runtime", "For", "these", "tests."]
    assert expected in [line.split() for line in printed.splitlines()]
    [record] = [r for r in json.loads(as_json) if r["name"] == "fused"]
    assert (record["operation"], record["steady"]) == (f"{__name__}:Fused", False)


def test_a_plugin_of_rules_alone_provides_something(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = GramianRuleSpec(name="a", operation="l:A", rule="r:a", summary="s", api_version=1)
    plugin = PluginRecord(
        distribution="my-rules", version="1.0", entry_point="mine", gramian_rules=(spec,)
    )
    monkeypatch.setattr(_records, "discover", lambda: (plugin,))

    _, printed = run(capsys, "plugins")
    _, as_json = run(capsys, "plugins", "--json")

    assert printed.splitlines()[1].endswith("ok      1 Gramian rule")
    assert json.loads(as_json)[0]["gramian_rules"] == ["a"]


def test_errors_are_told_in_one_line_that_a_terminal_does_not_obey(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("in \x1b[31mred\x1b[0m,\na second\rline\x9b2J and \u202ebackwards")
    plugin = PluginRecord(distribution="red", version="1.0", entry_point="red", error=error)
    monkeypatch.setattr(_records, "discover", lambda: (plugin,))

    _, printed = run(capsys, "plugins")

    line = printed.splitlines()[1]
    assert line.isprintable()
    assert line.endswith("RuntimeError: in [31mred [0m, a second line 2J and backwards")


@pytest.mark.parametrize("command", ["info", "check"])
def test_asking_for_a_rule_as_a_method_tells_where_it_is(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register_rule("fused", f"{__name__}:Fused")

    assert main([command, "fused"]) == 2
    assert "There is a Gramian rule of this name: `jdcore list --rules`" in capsys.readouterr().err


def test_asking_for_a_scalarizer_as_a_method_tells_what_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    register_scalarizer("total", "Total")

    assert main(["info", "total"]) == 2
    assert "There is one of kind scalarizer: jdcore.get_scalarizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("operation", "rule", "trouble"),
    [
        (f"{__name__}:Fused", "Total", None),
        ("no_such_library.layers:Fused", "Total", None),
        ("FusedBackward0", "Total", None),
        (f"{__name__}:Fuzed", "Total", f"PluginError: .*'{__name__}:Fuzed' cannot be loaded"),
        ("tests.nowhere:Fused", "Total", "PluginError: .*'tests.nowhere:Fused' cannot be loaded"),
        (f"{__name__}:Total", "Total", "the operation .*:Total' is no torch.autograd.Function"),
        (f"{__name__}:Fused", "Misspelt", "PluginError: .*:Misspelt' cannot be loaded"),
        (f"{__name__}:Fused", "__name__", "PluginError: .*__name__' cannot be loaded: neither"),
    ],
)
def test_the_doctor_looks_for_rules_and_their_operations(
    operation: str, rule: str, trouble: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    register_rule("fused", operation, rule)

    code, printed = run(capsys, "doctor", "--json")
    report = json.loads(printed)
    [trial] = [t for t in report["trials"] if t["method"] == "runtime:fused"]

    assert code == (0 if trouble is None else 1)
    if trouble is None:
        assert trial["trouble"] is None
    else:
        assert re.match(trouble, trial["trouble"])
        assert report["troubles"] == [f"rule runtime:fused: {trial['trouble']}"]


def test_a_pipe_that_is_closed_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from jdcore.cli import main; raise SystemExit(main(['list']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()

    assert process.returncode == 0
    assert errors == ""


def test_what_a_method_looks_at_and_that_it_wraps_another_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    register("even_losses", "EvenWeighting", losses=True, wrapper=True)
    register("even_cross", "EvenWeighting", cross_gramian=True)

    listed = {line.split()[0]: line for line in run(capsys, "list")[1].splitlines()}
    info = run(capsys, "info", "even_losses")[1]

    assert "gramian, losses" in listed["even_losses"]
    assert "wrapper" in listed["even_losses"]
    assert "cross_gramian" in listed["even_cross"]
    assert "input:       gramian, losses\n" in info
    assert "wraps:       another method\n" in info
