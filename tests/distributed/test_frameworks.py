"""Training loops of Lightning and Accelerate on several processes, against one process."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import jdcore
from jdcore.autojac import backward, jac_to_grad
from tests.distributed.common import TASKS, WIDTH, assert_close, batch, full
from tests.distributed.conftest import Run

pytestmark = pytest.mark.slow

STEPS = 10


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, TASKS)).double()


def _losses(net: nn.Module, data: Tensor) -> list[Tensor]:
    return list((net(data) - 1).square().mean(0))


def _reference() -> nn.Module:
    """Adam in one process on the whole batches."""
    net, aggregator = _net(), jdcore.get_aggregator("upgrad")
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [batch(rank, step) for rank in range(dist.get_world_size())]
        backward(_losses(net, torch.cat(parts)))
        jac_to_grad(net.parameters(), aggregator)
        optimizer.step()
    return net


def _environment() -> None:
    """What frameworks read to find the processes that are there already."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, GROUP_RANK="0",
        MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="true",
    )  # fmt: skip


def _fit(strategy: str) -> nn.Module:
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    _environment()

    class Loop(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.net, self.aggregator = _net(), jdcore.get_aggregator("upgrad")

        def configure_model(self) -> None:
            if strategy == "sharded":
                for layer in (self.net[0], self.net[2], self.net):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

        def training_step(self, step: int, _: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            backward(_losses(self.net, batch(self.global_rank, int(step))))
            jac_to_grad(self.net.parameters(), self.aggregator)
            optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(range(STEPS), batch_size=None)

    options: dict[str, Any] = {"process_group_backend": "gloo"}
    if strategy == "replicated":
        chosen = DDPStrategy(cluster_environment=TorchElasticEnvironment(), **options)
        plugins = None
    else:
        chosen = ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            **options,
        )
        plugins = TorchElasticEnvironment()
    loop = Loop()
    lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=chosen,
        plugins=plugins,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(loop)
    return loop.net


def _lightning_replicated() -> None:
    net = _fit("replicated")
    assert_close(net.parameters(), _reference().parameters(), 1e-10)


def _lightning_sharded() -> None:
    net = _fit("sharded")
    net.reshard()
    assert_close(map(full, net.parameters()), _reference().parameters(), 1e-10)


def test_lightning_with_replicated_parameters(two: Run) -> None:
    pytest.importorskip("lightning")
    two(_lightning_replicated)


def test_lightning_with_sharded_parameters(two: Run) -> None:
    pytest.importorskip("lightning")
    two(_lightning_sharded)


def _accelerate() -> None:
    import accelerate

    _environment()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    net = _net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    net, optimizer = accelerator.prepare(net, optimizer)
    aggregator = jdcore.get_aggregator("upgrad")
    for step in range(STEPS):
        for part in batch(dist.get_rank(), step).chunk(2):
            with accelerator.accumulate(net):
                backward([loss / 2 for loss in _losses(net, part)])
                if accelerator.sync_gradients:
                    jac_to_grad(net.parameters(), aggregator)
                optimizer.step()
                optimizer.zero_grad()
    assert_close(net.parameters(), _reference().parameters(), 1e-10)


def test_accelerate_with_gradient_accumulation(two: Run) -> None:
    pytest.importorskip("accelerate")
    two(_accelerate)
