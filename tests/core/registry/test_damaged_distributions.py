"""One damaged distribution, a plugin or not, never breaks a look-up of another one's method."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.registry.unpacked import PLUGIN, run, unpack

LATIN = "Author: Hervé\n".encode("latin-1")
HEAD = b"Metadata-Version: 2.1\nName: damaged\nVersion: 1.0\n"

LIST = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    names = jdcore.list_aggregators()
messages = [str(w.message) for w in caught]
others = [r for r in jdcore.list_plugins() if not r.disabled and r.distribution != "healthy"]
record = others[0] if others else None
"""


def healthy(folder: Path) -> None:
    unpack(folder, "healthy", {"healthy.py": PLUGIN.format(method="healthy_method")})


@pytest.mark.parametrize(
    ("metadata", "version"),
    [
        (None, ""),
        (b"", ""),
        (b"Metadata-Version: 2.1\nName: damaged\n", ""),
        (b"Metadata-Version: 2.1\nVersion: 1.0\n", "1.0"),
        (HEAD + LATIN, ""),
        (b"\xff\xfe\x00", ""),
    ],
    ids=["no METADATA", "empty METADATA", "no Version", "no Name", "not UTF-8", "bytes"],
)
def test_a_plugin_with_damaged_metadata_works_without_them(
    tmp_path: Path, metadata: bytes | None, version: str
) -> None:
    healthy(tmp_path)
    source = {"damaged.py": PLUGIN.format(method="damaged_method")}
    unpack(tmp_path, "damaged", source, metadata=metadata)

    code = f"{LIST}result = names, messages, [record.label, record.version]"
    names, messages, told = run(tmp_path, code, JDCORE_PLUGINS="healthy,damaged")

    assert names == ["damaged_method", "healthy_method"]
    assert messages == []
    assert told == ["damaged (damaged)", version]


@pytest.mark.parametrize(
    "entry_points",
    [
        b"[jdcore.plugins]\nherv\xe9 = damaged\n",
        b"[jdcore.plugins]\ndamaged = damaged\n\xff\xfe",
    ],
)
def test_entry_points_that_cannot_be_read_are_reported_if_they_are_those_of_a_plugin(
    tmp_path: Path, entry_points: bytes
) -> None:
    healthy(tmp_path)
    unpack(tmp_path, "damaged", {}, entry_points=entry_points)

    code = f"{LIST}result = names, messages, [record.label, record.reason]"
    names, [message], told = run(tmp_path, code, JDCORE_PLUGINS="healthy,damaged")

    assert names == ["healthy_method"]
    assert told[0] == "damaged (entry_points.txt)"
    assert "codec can't decode byte" in told[1]
    assert f"{told[0]} failed: {told[1]}" in message


@pytest.mark.parametrize(
    "entry_points",
    [b"[console_scripts]\nherv\xe9 = damaged:main\n", b"\xff\xfe\x00", b"[", b"damaged"],
)
def test_entry_points_of_others_that_cannot_be_read_are_none_of_our_business(
    tmp_path: Path, entry_points: bytes
) -> None:
    healthy(tmp_path)
    unpack(tmp_path, "damaged", {}, entry_points=entry_points)

    names, messages = run(tmp_path, f"{LIST}result = names, messages", JDCORE_PLUGINS="healthy")

    assert names == ["healthy_method"]
    assert messages == []


def test_a_plugin_with_one_impossible_field_is_left_out_as_a_whole(tmp_path: Path) -> None:
    healthy(tmp_path)
    source = PLUGIN.format(method="fine").replace(
        'yield spec("fine")',
        'yield spec("fine")\n    yield AggregatorSpec(name="odd", summary="For tests.", '
        'weighting="a:OddWeighting", api_version=1, properties=("non_conflicting",))',
    )
    unpack(tmp_path, "damaged", {"damaged.py": source})

    code = f"{LIST}result = names, messages, record.reason"
    names, [message], reason = run(tmp_path, code, JDCORE_PLUGINS="healthy,damaged")

    assert names == ["healthy_method"]
    assert reason.startswith("ParameterTypeError: Parameter `properties` must be a set of Property")
    assert reason in message


@pytest.mark.parametrize("value", ["", "not a module!", "damaged:", "damaged.nowhere", "a:b:c"])
def test_an_entry_point_that_names_no_object_fails_alone(tmp_path: Path, value: str) -> None:
    healthy(tmp_path)
    entry_points = f"[jdcore.plugins]\ndamaged = {value}\n".encode()
    unpack(tmp_path, "damaged", {"damaged.py": "nothing = 1\n"}, entry_points=entry_points)

    code = f"{LIST}result = names, len(messages), record.reason"
    names, warned, told = run(tmp_path, code, JDCORE_PLUGINS="healthy,damaged")

    assert (names, warned) == (["healthy_method"], 1)
    # By what the author wrote, not by what Python makes of it.
    assert value in told
    assert "NoneType" not in told


def test_a_module_that_puts_a_hostile_object_in_its_place_fails_alone(tmp_path: Path) -> None:
    healthy(tmp_path)
    source = """
import sys

class Lazy:
    def __getattr__(self, name):
        raise ImportError(f"{name} comes later")

sys.modules[__name__] = Lazy()
"""
    unpack(tmp_path, "damaged", {"damaged.py": source})

    code = f"{LIST}result = names, record.reason"
    names, reason = run(tmp_path, code, JDCORE_PLUGINS="healthy,damaged")

    assert names == ["healthy_method"]
    assert reason == "ImportError: __name__ comes later"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import asyncio; raise asyncio.CancelledError('stop')", "CancelledError: stop"),
        ("raise GeneratorExit('stop')", "GeneratorExit: stop"),
        ("raise BaseException('stop')", "BaseException: stop"),
        (
            "class Mute(Exception):\n    def __str__(self): raise ValueError('no words')\n"
            "raise Mute",
            "Mute: (its message cannot be shown)",
        ),
        (
            "class Odd(Exception):\n    def __str__(self): return 3\nraise Odd",
            "Odd: (its message cannot be shown)",
        ),
        (
            "class Exits(Exception):\n    def __str__(self): raise SystemExit\nraise Exits",
            "Exits: (its message cannot be shown)",
        ),
    ],
)
def test_whatever_a_plugin_raises_it_fails_alone(tmp_path: Path, source: str, reason: str) -> None:
    healthy(tmp_path)
    unpack(tmp_path, "damaged", {"damaged.py": source})

    code = f"{LIST}result = names, messages, record.reason, record.traceback"
    names, [message], told, traceback = run(tmp_path, code, JDCORE_PLUGINS="healthy,damaged")

    assert names == ["healthy_method"]
    assert told == reason
    assert reason in message
    assert "damaged.py" in traceback


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("raise SystemExit('no license')", "'factory:S' cannot be loaded: no license"),
        (
            "import no_such_solver",
            "No module named 'no_such_solver'. Run: pip install no-such-solver",
        ),
    ],
    ids=["leaves", "lacks a distribution"],
)
def test_a_factory_may_raise_anything_too(tmp_path: Path, factory: str, told: str) -> None:
    source = """
from jdcore import SolverSpec, hookimpl

@hookimpl
def jdcore_solvers():
    yield SolverSpec(name="s", problem="p", summary="S.", factory="factory:S", api_version=1,
                     requires=("no-such-solver", "numpy"))
"""
    unpack(tmp_path, "failing", {"failing.py": source, "factory.py": factory})

    error = run(
        tmp_path,
        """
try:
    jdcore.get_solver("p", "s")
except jdcore.PluginError as error:
    result = str(error)
""",
        JDCORE_PLUGINS="failing",
    )

    assert error.endswith(told)


def test_a_finder_that_raises_hides_only_what_it_would_have_found(tmp_path: Path) -> None:
    healthy(tmp_path)

    code = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        return None
    def find_distributions(self, context):
        raise RuntimeError("a broken editable installation")

sys.meta_path.insert(0, Finder())
result = jdcore.list_aggregators()
"""
    assert run(tmp_path, code, JDCORE_PLUGINS="healthy") == ["healthy_method"]


def test_a_distribution_found_twice_counts_once_where_it_is_imported_from(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    unpack(first, "twice", {"twice.py": PLUGIN.format(method="first_method")})
    unpack(
        second,
        "twice",
        {"twice.py": PLUGIN.format(method="second_method")},
        metadata=b"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n",
        entry_points=b"[jdcore.plugins]\nother = twice\n",
    )

    code = f"import sys; sys.path.append({str(second)!r})\n" + (
        "result = [(p.version, p.entry_point, *[spec.name for spec in p.aggregators])"
        " for p in jdcore.list_plugins() if p.distribution == 'twice']"
    )
    assert run(first, code, JDCORE_PLUGINS="twice") == [["1.0", "twice", "first_method"]]


def test_of_two_entry_points_of_a_distribution_with_one_name_the_later_one_fails(
    tmp_path: Path,
) -> None:
    source = PLUGIN.format(method="same")
    more = source + "    yield spec('other')\n"
    points = b"[jdcore.plugins]\na = double\nb = double_too\n"
    unpack(tmp_path, "double", {"double.py": source, "double_too.py": more}, entry_points=points)

    code = (
        f"{LIST}reasons = [p.reason for p in jdcore.list_plugins() if p.distribution == 'double']\n"
    )
    code += "result = names, reasons, jdcore.describe('double:same').name"
    names, reasons, found = run(tmp_path, code, JDCORE_PLUGINS="double")

    assert names == ["same"]
    assert reasons == [
        "",
        "ParameterTypeError: Parameter `specs` must be of names that no other entry point of the "
        "distribution has, got the aggregator 'same', which 'a' has.",
    ]
    assert found == "same"


@pytest.mark.parametrize(
    ("before", "after", "returned"),
    [
        ("yield spec", "spec", "None"),
        ("yield spec", "return spec", "an object of type AggregatorSpec"),
        ("def jdcore", "async def jdcore", "an object of type async_generator"),
    ],
)
def test_a_hook_that_does_not_return_several_specs_is_named(
    tmp_path: Path, before: str, after: str, returned: str
) -> None:
    source = PLUGIN.format(method="m").replace(before, after)
    unpack(tmp_path, "forgetful", {"forgetful.py": source})

    code = f"{LIST}result = [p.reason for p in jdcore.list_plugins() if p.error]"
    assert run(tmp_path, code, JDCORE_PLUGINS="forgetful") == [
        "ParameterTypeError: Parameter `jdcore_aggregators` must be a function that yields specs, "
        f"or returns a list of them, got one that returns {returned}."
    ]


def test_the_reason_of_a_misspelt_hook_is_one_line(tmp_path: Path) -> None:
    source = PLUGIN.format(method="m").replace("aggregators():", "aggregators(registry):")
    unpack(tmp_path, "misspelt", {"misspelt.py": source})

    code = f"{LIST}result = [p.reason for p in jdcore.list_plugins() if p.reason]"
    [reason] = [r for r in run(tmp_path, code, JDCORE_PLUGINS="misspelt") if "registry" in r]

    assert "\n" not in reason


def test_twenty_thousand_specs_cost_a_few_calls_each(tmp_path: Path) -> None:
    # Counted, not timed: quadratic work in the number of specs would be 400 million calls.
    source = """
from jdcore import AggregatorSpec, GramianRuleSpec, SolverSpec, hookimpl

@hookimpl
def jdcore_aggregators():
    for i in range(10_000):
        name = f"w:M{i}Weighting"
        yield AggregatorSpec(name=f"m{i}", summary="S.", weighting=name, api_version=1)

@hookimpl
def jdcore_solvers():
    for i in range(5_000):
        yield SolverSpec(name=f"s{i}", problem="p", summary="S.", factory="s:S", api_version=1)

@hookimpl
def jdcore_gramian_rules():
    for i in range(5_000):
        yield GramianRuleSpec(
            name=f"r{i}", operation=f"l:L{i}", rule="r:R", summary="S.", api_version=1
        )
"""
    unpack(tmp_path, "many", {"many.py": source})
    code = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
jdcore.list_plugins()  # imports
jdcore.refresh()
sys.setprofile(count)
names = jdcore.list_aggregators()
sys.setprofile(None)
result = len(names), calls
"""
    number, calls = run(tmp_path, code, JDCORE_PLUGINS="many")

    assert number == 10_000
    assert calls < 20_000 * 150
