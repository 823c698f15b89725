"""
Every plugin is loaded once, and no plugin can make a look-up wait for ever.

Plugin code runs without any lock of jdcore: a plugin may look a method up while it is imported,
start threads that do so and join them, or fork. A thread waits for another thread that loads a
plugin, or that imports its module for reasons of its own. It does not wait for itself, nor for a
thread that waits in turn: it goes on without this plugin, which stays *pending* until the next
look-up.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

from attrs import evolve

from jdcore._discovery import Plugin, PluginRecord, load

_POLL = 0.02
"""Seconds between two looks at a thread that is waited for."""

_STILL = 1.0
"""Seconds that a thread may wait for others, be it for us, before it counts as blocked."""

_PATIENCE = 60.0
"""Seconds after which even a thread that seems to work is waited for no longer."""

_waits_for: dict[int, int] = {}
"""Which thread a thread waits for that is in :func:`_others_finish`."""


class Loading:
    """
    The installed plugins, each loaded by the first thread that needs it.

    :param plugins: What is installed.
    """

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._records: dict[Plugin, PluginRecord] = {}
        self._loaders: dict[Plugin, int] = {}
        self._change = threading.Condition()

    def advance(self) -> None:
        """Load what is not loaded yet. The plugins that cannot be loaded now stay pending."""
        for plugin in self.plugins:
            # Asked without the lock: a record that is there once stays.
            if plugin not in self._records and self._claim(plugin):
                self._load(plugin)

    def records(self) -> tuple[PluginRecord, ...]:
        """One record per plugin, in their order."""
        return tuple(self._records.get(p) or evolve(p.record, pending=True) for p in self.plugins)

    def _claim(self, plugin: Plugin) -> bool:
        """Whether this thread is to load the plugin now."""
        _others_finish(lambda: self._loaders.get(plugin), self._wait)
        with self._change:
            if plugin in self._records or plugin in self._loaders:
                return False
            self._loaders[plugin] = threading.get_ident()
            return True

    def _wait(self, seconds: float) -> None:
        with self._change:
            self._change.wait(seconds)

    def _load(self, plugin: Plugin) -> None:
        record = None
        try:
            if _others_finish(lambda: _importer_of(plugin), self._wait):
                record = load(plugin)
        finally:
            with self._change:
                del self._loaders[plugin]
                # A module that is not complete yet has not failed; somebody is still importing it.
                failed = record is not None and record.error is not None
                if record is not None and not (failed and _importer_of(plugin) is not None):
                    self._records[plugin] = record
                self._change.notify_all()

    # -- forks -------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Before a fork: wait for other threads that load plugins, as they end with the fork."""
        for plugin in tuple(self._loaders):
            _others_finish(lambda p=plugin: self._loaders.get(p), self._wait)  # type: ignore[misc]

    def inherit(self) -> None:
        """In a forked process: only the thread that forked is there, and holds no lock of ours."""
        self._change = threading.Condition()
        _waits_for.clear()
        # A fork keeps the thread that called it, under its number, and no other.
        mine = threading.get_ident()
        self._loaders = {p: ident for p, ident in self._loaders.items() if ident == mine}


def _others_finish(busy: Callable[[], int | None], wait: Callable[[float], Any]) -> bool:
    """
    Wait while another thread is at something.

    :param busy: The thread that is at it, or None once it is done.
    :param wait: Waits for some seconds, or until something changes.
    :returns: Whether it is done. False if it is this thread that is at it, or a blocked one.
    """
    me = threading.get_ident()
    start = moved = time.monotonic()
    try:
        while (ident := busy()) is not None:
            # For the other threads that would wait for this one, to see a circle.
            _waits_for[me] = ident
            now = time.monotonic()
            if not _is_blocked(ident):
                moved = now
            if ident == me or now - moved > _STILL or now - start > _PATIENCE:
                return False
            wait(_POLL)
        return True
    finally:
        _waits_for.pop(me, None)


def _is_blocked(ident: int) -> bool:
    """Whether a thread waits for others: for a lock, an event, a thread, or an import."""
    chain = []
    while ident in _waits_for and ident not in chain:  # for a thread that waits here, and so on
        chain.append(ident)
        ident = _waits_for.get(ident, ident)
    # Of all threads, Python tells where they are, and not what they wait for.
    frame = sys._current_frames().get(ident)
    if frame is None or ident in chain:  # it is gone, or they wait for each other
        return True
    code = frame.f_code
    # The locks of modules that are being imported are taken in `_ModuleLock.acquire`.
    imports = code.co_filename == "<frozen importlib._bootstrap>" and code.co_name == "acquire"
    return imports or code.co_filename == threading.__file__


def _importer_of(plugin: Plugin) -> int | None:
    """
    The thread that is importing the module of a plugin, or a package around it.

    This thread if nobody can be seen to, as in a process forked in the middle of the import:
    nothing will change while it waits.
    """
    for name in _modules_of(plugin):
        module: Any = sys.modules.get(name)
        # A module may put any object in its place, which may answer to every name, or raise.
        namespace = vars(module) if issubclass(type(module), ModuleType) else {}
        # Private, but the one place that tells a module whose code has not run to its end; all
        # versions of CPython from 3.3 on have it. Without it nothing counts as being imported.
        if getattr(namespace.get("__spec__"), "_initializing", False):
            return _thread_that_runs(namespace) or threading.get_ident()
    return None


def _modules_of(plugin: Plugin) -> Iterator[str]:
    """The package of the plugin's module, and so on down to the module itself."""
    if plugin.point is None:
        return
    parts = plugin.point.value.partition(":")[0].strip().split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _thread_that_runs(namespace: dict[str, Any]) -> int | None:
    """The thread on whose stack the code of a module runs."""
    # An import tells its thread nowhere but on the stack: the frame of the module's own code.
    for ident, innermost in sys._current_frames().items():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_globals is namespace and frame.f_code.co_name == "<module>":
                return ident
            frame = frame.f_back
    return None
