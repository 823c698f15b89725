"""No plugin can make a look-up wait for ever, and none is lost for having been busy."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jdcore._loading import _others_finish
from tests.core.registry.unpacked import PLUGIN, run, unpack

pytestmark = pytest.mark.skipif("not hasattr(__import__('os'), 'fork')", reason="needs forks")


def install(folder: Path, **prologues: str) -> None:
    """Plugins that begin with some code; each provides a method by its own name."""
    for name, prologue in prologues.items():
        unpack(folder, name, {f"{name}.py": prologue + PLUGIN.format(method=name)})


STARTS = "import builtins, time\nbuiltins.started.set()\n"
"""Says that the plugin is being imported; what follows keeps it busy, not waiting for a thread."""


def plugins(*names: str) -> dict[str, str]:
    return {"JDCORE_PLUGINS": ",".join(names)}


def test_a_plugin_may_look_up_while_it_is_imported(tmp_path: Path) -> None:
    seen = "import jdcore, builtins\nbuiltins.seen = jdcore.list_aggregators()\n"
    install(tmp_path, asks=seen, other="")

    code = "import builtins; names = jdcore.list_aggregators(); result = builtins.seen, names"
    seen_by_plugin, names = run(tmp_path, code, **plugins("asks", "other"))

    assert seen_by_plugin == ["other"]
    assert names == ["asks", "other"]


def test_a_thread_does_not_wait_for_itself() -> None:
    waited: list[float] = []

    assert not _others_finish(threading.get_ident, waited.append)
    assert waited == []


@pytest.mark.parametrize("first", ["user", "registry"])
def test_a_package_that_imports_a_method_is_not_lost_when_the_user_imports_it_first(
    tmp_path: Path, first: str
) -> None:
    own = 'import jdcore\nfirst = jdcore.describe("other").name\n'
    files = {
        "package/__init__.py": own,
        "package/plugin.py": "from package import first\n" + PLUGIN.format(method="mine"),
    }
    entry_points = b"[jdcore.plugins]\npackage = package.plugin\n"
    unpack(tmp_path, "package", files, entry_points=entry_points)
    install(tmp_path, other="")

    begin = "import package" if first == "user" else "jdcore.list_plugins(); import package"
    code = f"{begin}; result = package.first, jdcore.list_aggregators()"
    looked_up, names = run(tmp_path, code, **plugins("package", "other"))

    assert looked_up == "other"
    assert names == ["mine", "other"]


def test_the_error_for_a_method_of_a_plugin_that_is_being_imported_says_so(tmp_path: Path) -> None:
    own = """
import jdcore
try:
    jdcore.describe("asks:asks")
except jdcore.PluginError as error:
    told = str(error)
"""
    install(tmp_path, asks=own)

    told, status = run(
        tmp_path,
        "import asks; [r] = [r for r in jdcore.list_plugins() if not r.disabled]; "
        "result = asks.told, r.pending",
        **plugins("asks"),
    )

    assert told == "Plugin asks (asks) cannot be used: it is being imported at this moment."
    assert status is False


JOINS = """
import jdcore, threading
seen = []
thread = threading.Thread(target=lambda: seen.append(jdcore.list_aggregators()))
thread.start()
thread.join()
"""


def test_a_plugin_may_join_a_thread_that_looks_up(tmp_path: Path) -> None:
    install(tmp_path, joins=JOINS, other="")

    code = "names = jdcore.list_aggregators(); import joins; result = joins.seen, names"
    seen, names = run(tmp_path, code, **plugins("joins", "other"))

    assert seen == [["other"]]
    assert names == ["joins", "other"]


def test_a_hook_may_join_a_thread_that_looks_up(tmp_path: Path) -> None:
    source = PLUGIN.format(method="joins").replace("    yield", f"    {'%s'}\n    yield")
    body = JOINS.replace("\n", "\n    ").replace("seen = []", "global seen; seen = []")
    unpack(tmp_path, "joins", {"joins.py": source % body})
    install(tmp_path, other="")

    code = "names = jdcore.list_aggregators(); import joins; result = joins.seen, names"
    seen, names = run(tmp_path, code, **plugins("joins", "other"))

    assert seen == [["other"]]
    assert names == ["joins", "other"]


def test_two_threads_may_import_plugins_that_look_each_other_up(tmp_path: Path) -> None:
    meets = "import builtins, jdcore\nbuiltins.barrier.wait()\njdcore.list_aggregators()\n"
    install(tmp_path, left=meets, right=meets)

    code = """
import builtins, importlib, threading
builtins.barrier = threading.Barrier(2)
threads = [
    threading.Thread(target=importlib.import_module, args=(name,)) for name in ("left", "right")
]
for thread in threads: thread.start()
for thread in threads: thread.join()
result = jdcore.list_aggregators()
"""
    assert run(tmp_path, code, **plugins("left", "right")) == ["left", "right"]


def test_threads_wait_for_a_plugin_that_another_thread_imports(tmp_path: Path) -> None:
    install(tmp_path, slow=f"{STARTS}time.sleep(1.5)\n", other="")

    code = """
import builtins, importlib, threading
builtins.started = threading.Event()
thread = threading.Thread(target=importlib.import_module, args=("slow",))
thread.start()
builtins.started.wait()
names = []
threads = [threading.Thread(target=lambda: names.append(jdcore.list_aggregators())) for _ in "abc"]
for each in [*threads]: each.start()
for each in [*threads, thread]: each.join()
result = names
"""
    assert run(tmp_path, code, **plugins("slow", "other")) == [["other", "slow"]] * 3


FORK = """
import os
def child(action):
    read, write = os.pipe()
    process = os.fork()
    if not process:
        os.write(write, json.dumps(action()).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(process, 0)
    return json.loads(os.read(read, 10_000))
"""


def test_a_process_forked_during_discovery_has_every_plugin(tmp_path: Path) -> None:
    install(tmp_path, slow=f"{STARTS}time.sleep(1)\n", other="")

    code = f"""
import builtins, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
{FORK}
builtins.started = threading.Event()
thread = threading.Thread(target=jdcore.list_aggregators)
thread.start()
builtins.started.wait()
result = child(jdcore.list_aggregators)
thread.join()
"""
    assert run(tmp_path, code, **plugins("slow", "other")) == ["other", "slow"]


def test_a_process_forked_while_a_user_imports_a_plugin_does_without_it(tmp_path: Path) -> None:
    until_forked = "while not builtins.forked: time.sleep(0.01)\n"
    install(tmp_path, slow=STARTS + until_forked, other="")

    code = f"""
import builtins, importlib, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
{FORK}
builtins.started, builtins.forked = threading.Event(), False
thread = threading.Thread(target=importlib.import_module, args=("slow",))
thread.start()
builtins.started.wait()
in_child = child(jdcore.list_aggregators)
builtins.forked = True
thread.join()
result = in_child, jdcore.list_aggregators()
"""
    in_child, names = run(tmp_path, code, **plugins("slow", "other"))

    assert in_child == ["other"]
    assert names == ["other", "slow"]


def test_a_plugin_may_fork_while_it_is_imported(tmp_path: Path) -> None:
    forks = f"import json, jdcore\n{FORK}\nseen = child(jdcore.list_aggregators)\n"
    install(tmp_path, forks=forks, other="")

    code = "names = jdcore.list_aggregators(); import forks; result = forks.seen, names"
    seen, names = run(tmp_path, code, **plugins("forks", "other"))

    assert seen == ["other"]
    assert names == ["forks", "other"]


def test_an_interrupt_stops_the_look_up_and_the_next_one_goes_on(tmp_path: Path) -> None:
    interrupted = """
import builtins
if not hasattr(builtins, "interrupted"):
    builtins.interrupted = True
    raise KeyboardInterrupt
"""
    install(tmp_path, long=interrupted, other="")

    code = """
try:
    jdcore.list_aggregators()
except KeyboardInterrupt:
    result = jdcore.list_aggregators()
"""
    assert run(tmp_path, code, **plugins("long", "other")) == ["long", "other"]


def test_a_refresh_during_discovery_loses_nothing(tmp_path: Path) -> None:
    install(tmp_path, refreshes="import jdcore\njdcore.refresh()\n", other="")

    code = "result = [jdcore.list_aggregators(), jdcore.list_aggregators()]"
    names = run(tmp_path, code, **plugins("refreshes", "other"))

    assert names[1] == ["other", "refreshes"]
