"""What a process holds in part only is refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from jdcore import ParameterError
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac, mtl_backward

parallel = pytest.importorskip("torch.distributed.tensor.parallel")
fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="needs FSDP2"),
    pytest.mark.filterwarnings("ignore"),
]


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.trunk(x).tanh()
        return features, [head(features).square().mean() for head in self.heads]


def _sharded() -> Tasks:
    model = Tasks()
    for part in (model.trunk, *model.heads):
        fsdp.fully_shard(part)
    return fsdp.fully_shard(model)


def _weighting(gramian: Tensor) -> Tensor:
    return gramian.diagonal()


def test_what_is_no_parameter_is_refused_where_parameters_are_sharded() -> None:
    model = _sharded()
    features, losses = model(torch.randn(5, 3))
    with pytest.raises(ParameterError, match=r"inputs\[0\].*mean over the processes"):
        jac(losses, features)


def test_an_engine_notices_modules_that_are_sharded_after_it_was_made() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    engine = Engine(model, batch_dim=0)
    fsdp.fully_shard(model)
    losses = model(torch.randn(5, 3)).squeeze(1)
    with pytest.raises(ParameterError, match="gathered by FSDP2"):
        engine.compute_gramian(losses)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gramian_of_the_samples_of_one_process_is_refused() -> None:
    model = _sharded()
    losses = model.heads[0](model.trunk(torch.randn(5, 3))).squeeze(1)
    with pytest.raises(ParameterError, match="FSDP2"):
        Engine(model, batch_dim=0).compute_gramian(losses)
    with pytest.raises(ParameterError, match="FSDP2"):
        Engine(model, batch_dim=None).cross_gramian(losses, losses.exp())


def test_an_engine_of_tensor_parallel_modules_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    mesh = init_device_mesh("cpu", (1,))
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, mesh, plan)
    losses = model(torch.randn(5, 3)).squeeze(1)
    with pytest.raises(ParameterError, match=r"tensor parallelism.*jac_to_grad"):
        Engine(model, batch_dim=0).backward(losses, _weighting)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("original", [False, True])
def test_flat_parameters_are_noticed(original: bool) -> None:
    model = fsdp.FullyShardedDataParallel(
        nn.Linear(3, 2), use_orig_params=original, device_id=torch.device("cpu")
    )
    losses = model(torch.randn(5, 3)).square().mean(dim=0)
    with pytest.raises(ParameterError, match=r"FlatParameter.*fully_shard"):
        backward(losses)


def test_a_plain_model_beside_a_sharded_one_is_served() -> None:
    sharded = _sharded()
    sharded(torch.randn(5, 3))
    plain = nn.Linear(3, 2)
    backward(plain(torch.randn(5, 3)).square().mean(dim=0))
    assert plain.weight.jac.shape == (2, 2, 3)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_what_is_frozen_after_the_forward_pass_gets_nothing(chunk_size: int | None) -> None:
    def frozen_late() -> tuple[Tasks, Tensor, list[Tensor]]:
        model = _sharded()
        features, losses = model(torch.randn(5, 3))
        model.trunk.requires_grad_(False)
        model.heads[0].requires_grad_(False)
        return model, features, losses

    model, _, losses = frozen_late()
    backward(losses, parallel_chunk_size=chunk_size)
    assert [hasattr(p, "jac") for p in model.parameters()] == [False] * 4 + [True] * 2

    model, features, losses = frozen_late()
    mtl_backward(losses, features, parallel_chunk_size=chunk_size)
    assert [p.grad is not None for p in model.parameters()] == [False] * 4 + [True] * 2
    assert not any(hasattr(p, "jac") for p in model.parameters())

    model, _, losses = frozen_late()
    gramian_backward(losses, _weighting)
    assert [p.grad is not None for p in model.parameters()] == [False] * 4 + [True] * 2
