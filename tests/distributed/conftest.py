from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

Run = Callable[[Callable[[], None]], None]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone: enough for what is refused."""
    if not dist.is_gloo_available():
        pytest.skip("needs the gloo backend")
    # A store in memory: a port may be taken by another run of the tests.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def launcher() -> Iterator[subprocess.Popen[str]]:
    if not dist.is_gloo_available():
        pytest.skip("needs the gloo backend")
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("launcher.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def _runner(launcher: subprocess.Popen[str], size: int) -> Run:
    def run(check: Callable[[], None]) -> None:
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        launcher.stdin.write(f"{size} {check.__module__} {check.__name__}\n")
        launcher.stdin.flush()
        texts = json.loads(launcher.stdout.readline())
        failures = [f"process {rank}:\n{text}" for rank, text in enumerate(texts) if text]
        assert not failures, "\n".join(failures)

    return run


@pytest.fixture
def two(launcher: subprocess.Popen[str]) -> Run:
    """Run a function of a test module in two processes."""
    return _runner(launcher, 2)


@pytest.fixture
def four(launcher: subprocess.Popen[str]) -> Run:
    """Run a function of a test module in four processes."""
    return _runner(launcher, 4)
