"""Discovery of real distributions, broken in real ways, in a fresh virtual environment."""

from __future__ import annotations

import pytest

from tests.core.registry.conftest import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.artefacts,
    pytest.mark.xdist_group("installed plugins"),
]

BROKEN = {
    "broken-import": "ModuleNotFoundError: No module named 'a_module_that_nobody_has_installed'",
    "broken-exit": "SystemExit: this plugin refuses to be imported",
    "broken-signature": "PluginValidationError: ",
    "broken-undecorated": "Decorate its hook functions with @jdcore.hookimpl.",
    "broken-hook-name": "PluginValidationError: unknown hook 'jdcore_agregators'",
    "broken-raising": "RuntimeError: the second spec could not be made",
    "broken-non-spec": "Parameter `spec` must be an instance of AggregatorSpec, got 'upgrad'.",
    "broken-version": "Parameter `api_version` must be 1, the plugin interface of this jdcore, got",
}

HEALTHY = "first_row"

DISCOVER = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    names = jdcore.list_aggregators()
    again = jdcore.list_aggregators()
"""


@pytest.mark.parametrize(("plugin", "reason"), BROKEN.items())
def test_a_broken_plugin_is_recorded_with_its_reason_and_the_others_go_on(
    run: Run, plugin: str, reason: str
) -> None:
    names, messages, record = run(
        DISCOVER
        + f"""
[record] = [r for r in jdcore.list_plugins() if r.distribution == {plugin!r}]
messages = [f"{{w.category.__name__}}: {{w.message}}" for w in caught]
result = names, messages, [record.version, record.reason, record.traceback, record.aggregators]
""",
        plugins=f"{plugin},healthy-plugin",
    )
    version, recorded_reason, traceback, specs = record

    assert names == ["first_row"]
    assert reason in recorded_reason
    assert version == "1.0"
    assert traceback.startswith("Traceback")
    assert specs == []
    [message] = messages
    assert message.startswith("PluginWarning: ")
    assert f"{plugin} ({plugin}) failed: " in message
    assert reason in message


def test_all_broken_plugins_together_give_one_warning_that_names_each(run: Run) -> None:
    names, messages = run(
        DISCOVER + "result = names, [str(w.message) for w in caught]",
        plugins=",".join([*BROKEN, "healthy-plugin"]),
    )

    assert names == ["first_row"]
    [message] = messages
    assert all(plugin in message for plugin in BROKEN)


def test_importing_the_core_reads_no_plugin_and_no_torch(run: Run) -> None:
    loaded = run("import sys; result = [m for m in sys.modules]", plugins="broken-exit")

    assert "broken_exit" not in loaded
    assert "torch" not in loaded


def test_a_slow_plugin_is_waited_for_by_the_first_look_up_only_and_by_no_import(run: Run) -> None:
    before, names, naps = run(
        """
import sys, time
before = "slow_plugin" in sys.modules
names = jdcore.list_aggregators()
naps = []
time.sleep = naps.append
again = jdcore.list_aggregators()
result = before, [names, again], naps
""",
        plugins="slow-plugin,healthy-plugin",
    )

    assert not before
    assert names == [["first_row", "late"]] * 2
    assert naps == []


def test_listing_imports_no_method_module(run: Run) -> None:
    loaded = run(
        "jdcore.list_aggregators(); jdcore.describe('first_row'); import sys; "
        "result = [m for m in sys.modules]",
        plugins="healthy-plugin",
    )

    assert "healthy_plugin" in loaded
    assert "healthy_plugin.first_row" not in loaded
    assert "torch" not in loaded


def test_asking_for_a_name_of_a_failed_plugin_chains_the_cause(run: Run) -> None:
    error, cause = run(
        """
import warnings
warnings.simplefilter("ignore")
try:
    jdcore.get_aggregator("broken-import:anything")
except jdcore.PluginError as error:
    result = str(error), type(error.__cause__).__name__
""",
        plugins="broken-import",
    )

    assert error.startswith("Plugin broken-import (broken-import) cannot be used: ModuleNotFound")
    assert cause == "ModuleNotFoundError"


def test_an_unknown_name_lists_the_plugins_that_failed(run: Run) -> None:
    error = run(
        """
import warnings
warnings.simplefilter("ignore")
try:
    jdcore.get_aggregator("anything")
except jdcore.UnknownNameError as error:
    result = str(error)
""",
        plugins="broken-import,healthy-plugin",
    )

    assert "Plugins that failed: broken-import (broken-import): ModuleNotFound" in error
    assert "Registered: first_row." in error


def test_a_factory_that_points_nowhere_fails_only_when_asked_for(run: Run) -> None:
    names, error = run(
        """
names = jdcore.list_aggregators()
try:
    jdcore.get_aggregator("pointing_nowhere")
except jdcore.PluginError as error:
    result = names, str(error)
""",
        plugins="broken-factory",
    )

    assert names == ["pointing_nowhere"]
    assert "'broken_factory:MissingWeighting' cannot be loaded" in error


def test_a_name_clash_disables_only_that_name(run: Run) -> None:
    names, messages, error, qualified, by_alias, unclaimed = run(
        DISCOVER
        + """
try:
    jdcore.get_aggregator("FirstRow")
except jdcore.AmbiguousNameError as caught_error:
    error = str(caught_error)
result = (
    names,
    [str(w.message) for w in caught],
    error,
    repr(jdcore.get_aggregator("clashing-plugin:first_row")),
    repr(jdcore.get_aggregator("primary-task")),
    repr(jdcore.get_aggregator("unclaimed")),
)
""",
        plugins="healthy-plugin,clashing-plugin",
    )

    assert names == ["clashing-plugin:first_row", "healthy-plugin:first_row", "unclaimed"]
    [message] = messages
    claims = "clashing-plugin:first_row and healthy-plugin:first_row"
    assert f"{claims}: they claim the same aggregator name 'firstrow'." in message
    assert "'clashing-plugin:first_row', 'healthy-plugin:first_row'" in error
    assert qualified == by_alias == unclaimed == "FirstRow()"


def test_an_aggregator_with_a_clashing_name_survives_pickling(run: Run) -> None:
    assert (
        run(
            """
import pickle, warnings
warnings.simplefilter("ignore")
aggregator = jdcore.get_aggregator("healthy-plugin:first_row")
result = repr(pickle.loads(pickle.dumps(aggregator)))
""",
            plugins="healthy-plugin,clashing-plugin",
        )
        == "FirstRow()"
    )


@pytest.mark.parametrize(
    ("plugins", "variables", "expected"),
    [
        ("", {}, []),
        ("healthy-plugin", {}, [HEALTHY]),
        (
            "Healthy_Plugin, clashing-plugin",
            {"JDCORE_DISABLE_PLUGINS": "clashing.plugin"},
            [HEALTHY],
        ),
        ("healthy-plugin", {"JDCORE_DISABLE_PLUGINS": "healthy-plugin"}, []),
    ],
)
def test_the_off_switches_choose_what_is_loaded(
    run: Run, plugins: str, variables: dict[str, str], expected: list[str]
) -> None:
    names = run("result = jdcore.list_aggregators()", plugins=plugins, **variables)

    assert names == expected


def test_a_switch_that_names_no_installed_plugin_warns(run: Run) -> None:
    names, messages = run(
        DISCOVER + "result = names, [str(w.message) for w in caught]",
        plugins="healthy-plugin,misspelt",
    )

    assert names == ["first_row"]
    [message] = messages
    assert "'misspelt' is switched on or off, but not installed" in message


def test_a_plugin_that_is_switched_off_is_not_imported_and_says_so_when_asked_for(run: Run) -> None:
    loaded, reason, error = run(
        """
import sys
[record] = [r for r in jdcore.list_plugins() if r.distribution == "broken-exit"]
try:
    jdcore.get_aggregator("broken-exit:anything")
except jdcore.PluginError as caught:
    result = "broken_exit" in sys.modules, record.reason, str(caught)
""",
        plugins="healthy-plugin",
    )

    assert not loaded
    assert reason == "it is switched off by JDCORE_PLUGINS."
    assert error.endswith("it is switched off by JDCORE_PLUGINS.")


@pytest.mark.parametrize("other", ["broken-import", "clashing-plugin"])
def test_strict_mode_raises_at_the_first_look_up_and_at_every_later_one(
    run: Run, other: str
) -> None:
    errors = run(
        """
result = []
for _ in range(2):
    try:
        jdcore.list_aggregators()
    except jdcore.PluginError as error:
        result.append(str(error))
""",
        plugins=f"{other},healthy-plugin",
        JDCORE_STRICT_PLUGINS="1",
    )

    assert len(errors) == 2
    assert other in errors[0]


def test_threads_that_race_for_the_first_look_up_all_see_every_plugin(run: Run) -> None:
    seen = run(
        """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
barrier = Barrier(16)
def look_up(_):
    barrier.wait()
    return jdcore.list_aggregators()
with ThreadPoolExecutor(16) as pool:
    result = list(pool.map(look_up, range(16)))
""",
        plugins="healthy-plugin",
    )

    assert seen == [["first_row"]] * 16


def test_a_spawned_worker_loads_the_aggregator_it_is_sent(run: Run, tmp_path: object) -> None:
    script = f"{tmp_path}/worker.py"
    with open(script, "w") as file:
        file.write(
            "import jdcore, torch, multiprocessing as mp\n"
            "def aggregate(a): return a(torch.eye(2)).tolist()\n"
            "if __name__ == '__main__':\n"
            "    with mp.get_context('spawn').Pool(1) as pool:\n"
            "        print(pool.apply(aggregate, (jdcore.get_aggregator('first_row'),)))\n"
        )
    output = run(
        "import subprocess, sys; "
        f"result = subprocess.check_output([sys.executable, {script!r}], text=True)",
        plugins="healthy-plugin",
    )

    assert output.strip() == "[1.0, 0.0]"
