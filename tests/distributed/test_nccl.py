"""Two GPUs with NCCL, which has a reduce-scatter of its own: the update of one process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import jdcore
from jdcore.autogram import Engine
from jdcore.autojac import backward, jac_to_grad
from tests.distributed.common import (
    Tasks,
    assert_close,
    assert_identical,
    batch,
    gradients,
    losses_of,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

TOLERANCE = 1e-10


def _parts() -> list[Tensor]:
    return [batch(rank).cuda() for rank in range(2)]


def _rows(wrap: Any) -> None:
    for name in ("upgrad", "trimmed_mean", "graddrop", "mean"):
        arguments = {"trim_number": 1} if name == "trimmed_mean" else {}
        generator = {"generator": torch.Generator()} if name == "graddrop" else {}
        ours, alone = wrap(Tasks().cuda()), Tasks().cuda()
        data = _parts()[dist.get_rank()], torch.cat(_parts())
        for module, own in zip((ours, alone), data, strict=True):
            if generator:
                generator["generator"].manual_seed(3)
            backward(losses_of(module(own)[1]))
            method = jdcore.get_aggregator(name, **arguments, **generator)
            jac_to_grad(module.parameters(), method)
        if wrap is fully_shard:
            ours.reshard()
        assert_close(gradients(ours), gradients(alone), TOLERANCE)
        assert_identical(gradients(ours))


def _samples(wrap: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1)).double().cuda()

    inner, alone = make(), make()
    wrapped = wrap(inner)
    weighting = jdcore.get_weighting("upgrad")
    own = wrapped(_parts()[dist.get_rank()]).squeeze(1).square()
    Engine(inner, batch_dim=0).backward(own, weighting)
    losses = alone(torch.cat(_parts())).squeeze(1).square()
    Engine(alone, batch_dim=0).backward(losses, weighting)
    if wrap is fully_shard:
        inner.reshard()
    assert_close(gradients(inner), gradients(alone), 1e-9)


def _work(rank: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for wrap in (DistributedDataParallel, fully_shard):
            _rows(wrap)
            _samples(wrap)
    finally:
        dist.destroy_process_group()


def test_two_gpus() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(_work, args=(store,), nprocs=2)  # raises what they raise
