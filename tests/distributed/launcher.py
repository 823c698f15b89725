"""
Teams of processes for the tests, as a script.

Reads lines ``size module function``, runs the function in each process of a team of that size and
answers with a line of JSON: one text per process, empty where the function returned. The processes
of a team stay for the next function, so that torch is imported once and groups are made once.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

import jdcore.autojac  # so that the forked processes have it  # noqa: F401
from jdcore import JDCoreWarning

SECONDS = 100
TESTS = Path(__file__).parents[1]


def _find_tests() -> None:
    # Not by its parent folder on the path, which would shadow an installed jdcore.
    spec = importlib.util.spec_from_file_location(
        "tests", TESTS / "__init__.py", submodule_search_locations=[str(TESTS)]
    )
    assert spec is not None
    sys.modules["tests"] = importlib.util.module_from_spec(spec)


def _serve(rank: int, size: int, store: str, orders: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS // 2),
    )
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", JDCoreWarning)
    while True:
        module, function = orders.recv()
        try:
            torch.manual_seed(0)
            getattr(importlib.import_module(module), function)()
            answer = ""
        except BaseException:
            answer = traceback.format_exc()
        gc.collect()  # what is left of graphs with hooks would be found by later functions
        orders.send(answer)


class Team:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("fork")
        store = tempfile.mkstemp()[1]
        os.unlink(store)
        self.orders, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            self.orders.append(here)
            self.processes.append(process)

    def run(self, module: str, function: str) -> list[str]:
        for order in self.orders:
            order.send((module, function))
        return [self._answer(order) for order in self.orders]

    def _answer(self, order: Connection) -> str:
        try:
            return order.recv() if order.poll(SECONDS) else f"no answer within {SECONDS} s"
        except EOFError:
            return "the process has died"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def main() -> None:
    _find_tests()
    teams: dict[int, Team] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed in the processes
    for line in sys.stdin:
        size, module, function = line.split()
        team = teams.get(int(size)) or Team(int(size))
        teams[int(size)] = team
        texts = team.run(module, function)
        if any(texts):  # the processes may have come to different places
            teams.pop(int(size)).end()
        answers.write(json.dumps(texts) + "\n")
        answers.flush()
    for team in teams.values():
        team.end()


if __name__ == "__main__":
    main()
