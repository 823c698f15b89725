"""Data parallelism is refused rather than letting the replicas drift apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from jdcore import ParameterError
from jdcore.autojac import backward, gramian_backward, jac, jac_to_grad, mtl_backward

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend"),
]


def _in_process(name: str, rank: int, store: str) -> None:
    """Run one of the functions below as one of two processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        globals()[name]()
    finally:
        dist.destroy_process_group()


def _run(body: Callable[[], None], store: Path) -> None:
    # This file as a script, not by multiprocessing: a spawned process would look for the module of
    # the function, which only pytest can import.
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, body.__name__, str(rank), store],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def _refused(match: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    with pytest.raises(ParameterError, match=match):
        call(*arguments, **keywords)


def _replicated() -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    losses = model(torch.randn(4, 3)).square().mean(dim=0)
    match = "drift apart.*all_reduce"
    _refused(match, backward, losses)
    _refused(match, backward, losses, inputs=model.parameters())
    _refused(match, gramian_backward, losses, lambda gramian: torch.ones(2))
    features = model(torch.randn(4, 3))
    _refused(match, mtl_backward, [features.sum(), features.prod()], features)
    for parameter in model.parameters():
        assert not hasattr(parameter, "jac")
        assert parameter.grad is None


def _averaged_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    nn.parallel.DistributedDataParallel(nn.Linear(1, 1))  # another one does no harm
    backward(model(torch.randn(4, 3) + dist.get_rank()).square().mean(dim=0))
    for parameter in model.parameters():
        dist.all_reduce(parameter.jac)
        parameter.jac /= dist.get_world_size()
    jac_to_grad(model.parameters(), lambda matrix: matrix.mean(dim=0))
    gradients = [torch.zeros_like(model.weight) for _ in range(2)]
    dist.all_gather(gradients, model.weight.grad)
    assert torch.equal(*gradients)
    assert not gradients[0].eq(0).all()


def _sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    assert isinstance(weight, DTensor)
    losses = weight.to_local().sum(dim=0)
    _refused("this process holds in full, got a DTensor", backward, losses)
    _refused("this process holds in full, got a DTensor", jac, losses)
    features = weight.to_local() * 2
    _refused("DTensor", mtl_backward, [features.sum(), features.prod()], features)
    assert weight.grad is None


def test_parameters_of_distributed_data_parallel_are_refused(tmp_path: Path) -> None:
    _run(_replicated, tmp_path / "store")


def test_averaging_jacobians_by_hand_keeps_the_processes_equal(tmp_path: Path) -> None:
    _run(_averaged_by_hand, tmp_path / "store")


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.tensor")
    _run(_sharded, tmp_path / "store")


if __name__ == "__main__":
    _in_process(sys.argv[1], int(sys.argv[2]), sys.argv[3])
