"""FSDP2 and tensor parallelism: the update of one process on the whole batch, in shards."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module

import jdcore
from jdcore import ParameterError, PeerError
from jdcore.aggregation import GramianAggregator
from jdcore.autojac import (
    _problem,
    backward,
    gramian_backward,
    jac,
    jac_to_grad,
    mtl_backward,
)
from jdcore.distributed import global_means
from jdcore.graph._batched import batched_gradients
from tests.distributed.common import (
    TASKS,
    Tasks,
    assert_close,
    assert_identical,
    batch,
    compare_every_method,
    gradients,
    losses_of,
    method_of,
    own_batch,
    refused,
    whole_batch,
)
from tests.distributed.conftest import Run

fsdp = pytest.importorskip("torch.distributed.fsdp")
parallel = pytest.importorskip("torch.distributed.tensor.parallel")
pytestmark = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="needs FSDP2")


def _mean(gramian: Tensor) -> Tensor:
    return gramian.diagonal().rsqrt()


def _shard(model: nn.Module, **options: Any) -> nn.Module:
    for part in (model.trunk[0], *model.heads):
        fsdp.fully_shard(part, **options)
    return fsdp.fully_shard(model, **options)


def _updates(
    ours: nn.Module,
    alone: nn.Module,
    method: Any,
    other: Any,
    step: int = 0,
    data: Any = own_batch,
) -> None:
    """One step of each."""
    found = []
    for module, aggregator, of in (
        (ours, method, data),
        (alone, other, whole_batch if data is own_batch else data),
    ):
        losses = losses_of(module(of(step))[1])
        backward(losses)
        found.append(jac_to_grad(module.parameters(), aggregator, losses=losses))
    weights, reference = found
    if reference is not None:
        assert weights is not None
        assert_close([weights], [reference], 1e-11)


def _compared(ours: nn.Module, alone: nn.Module, tolerance: float = 1e-12) -> None:
    for module in ours.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # some show gathered parameters after a forward pass
    _compared_gradients(ours, alone, tolerance)
    assert not any(hasattr(p, "jac") for p in ours.parameters())


def _compared_gradients(ours: nn.Module, alone: nn.Module, tolerance: float) -> None:
    pairs = zip(ours.parameters(), alone.parameters(), strict=True)
    assert all((p.grad is None) == (q.grad is None) for p, q in pairs)
    assert_close(gradients(ours), gradients(alone), tolerance)


def _fully_sharded() -> None:
    for options in ({}, {"reshard_after_forward": False}):
        ours, alone = _shard(Tasks(), **options), Tasks()
        for step in range(2):
            size = step + 1  # by passes that accumulate, and several rows at once
            backward(losses_of(ours(own_batch(step))[1]), parallel_chunk_size=size)
            backward(losses_of(alone(whole_batch(step))[1]))
            parameters = list(ours.parameters())  # some of them gathered
            for parameter, other in zip(parameters, alone.parameters(), strict=True):
                if hasattr(parameter, "jac"):
                    assert_close([parameter.jac], [other.jac])
            weights = jac_to_grad(parameters, GramianAggregator(_mean))
            expected = jac_to_grad(alone.parameters(), GramianAggregator(_mean))
            assert_close([weights], [expected])
        _compared(ours, alone)


def test_fully_sharded_parameters(two: Run) -> None:
    two(_fully_sharded)


def _at_once() -> None:
    """What a process holds of the rows is the same, however they are computed."""
    for options in ({}, {"reshard_after_forward": False}, {"reshard_after_forward": 1}):
        ours, alone = _shard(Tasks(), **options), Tasks()
        parameters = list(ours.parameters())
        with patch.object(_problem, "batched_gradients", wraps=batched_gradients) as batched:
            for size in (2, 1, None, TASKS):
                losses = torch.stack(losses_of(ours(own_batch())[1]))
                before = batched.call_count
                rows = jac(losses, parameters, parallel_chunk_size=size)
                assert (batched.call_count > before) is (size != 1)
                expected = jac(losses_of(alone(whole_batch())[1]), list(alone.parameters()))
                for parameter, row, other in zip(parameters, rows, expected, strict=True):
                    assert row.placements[0].dim == parameter.placements[0].dim + 1
                    assert_close([row], [other])
        sum(losses_of(ours(own_batch())[1])).backward()  # torch goes on as ever
        sum(losses_of(alone(whole_batch())[1])).backward()
        _compared(ours, alone)


def test_rows_of_gathered_parameters(two: Run) -> None:
    two(_at_once)


def _without_jacobian_kept() -> None:
    ours, alone = _shard(Tasks()), Tasks()
    for module, data in ((ours, own_batch()), (alone, whole_batch())):
        gramian_backward(losses_of(module(data)[1]), jdcore.get_weighting("upgrad"))
    _compared(ours, alone)


def test_gramian_backward(two: Run) -> None:
    two(_without_jacobian_kept)


def _every_method(dtype: torch.dtype = torch.float64, tolerance: float = 1e-12) -> None:
    compare_every_method(_shard, _compared_gradients, dtype, tolerance)


def test_every_method(two: Run) -> None:
    two(_every_method)


def _every_method_in_float32() -> None:
    _every_method(torch.float32, 1e-6)


@pytest.mark.slow
def test_every_method_in_float32(two: Run) -> None:
    two(_every_method_in_float32)


@pytest.mark.slow
def test_every_method_on_four_processes(four: Run) -> None:
    four(_every_method)


def _heads() -> None:
    ours, alone = _shard(Tasks()), Tasks()
    for step in range(2):
        for module, data in ((ours, own_batch(step)), (alone, whole_batch(step))):
            features, outputs = module(data)
            mtl_backward(losses_of(outputs), features)
            jac_to_grad(module.trunk.parameters(), GramianAggregator(_mean))
    _compared(ours, alone)
    features, outputs = ours(own_batch())
    groups = [list(head.parameters()) for head in ours.heads]
    trunk = list(ours.trunk.parameters())
    ours.zero_grad()
    mtl_backward(losses_of(outputs), features, tasks_params=[*groups[:2], []], shared_params=trunk)
    assert all(p.grad is None for p in groups[2])
    assert all(p.grad is not None for p in groups[0] + groups[1])


def test_multi_task_learning(two: Run) -> None:
    two(_heads)


def _training() -> None:
    """Adam, gradient accumulation and checkpointing together; hooks follow the update once."""
    ours, alone = Tasks(), Tasks()
    apply_activation_checkpointing(ours, check_fn=lambda m: m is ours.trunk[0])
    for part in (ours.trunk, *ours.heads):
        fsdp.fully_shard(part)
    fsdp.fully_shard(ours)
    optimizers = [torch.optim.Adam(module.parameters(), 1e-2) for module in (ours, alone)]
    aggregators = [jdcore.get_aggregator("upgrad") for _ in range(2)]
    calls = []
    ours.heads[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    for step in range(20):
        for module, of, optimizer, aggregator in zip(
            (ours, alone), (own_batch, whole_batch), optimizers, aggregators, strict=True
        ):
            for part in range(2):
                losses = losses_of(module(of(2 * step + part))[1])
                backward([loss / 2 for loss in losses])
            jac_to_grad(module.parameters(), aggregator)
            optimizer.step()
            optimizer.zero_grad()
    assert len(calls) == 20
    ours.reshard()
    assert_close(ours.parameters(), alone.parameters(), 1e-9)


def test_twenty_steps_of_adam(two: Run) -> None:
    two(_training)


def _mixed_precision() -> None:
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours, alone = _shard(Tasks(torch.float32), mp_policy=policy), Tasks(torch.float32)
    for module, data in ((ours, own_batch()), (alone, whole_batch())):
        backward([loss.float() for loss in losses_of(module(data.float())[1])])
        jac_to_grad(module.parameters(), GramianAggregator(_mean))
    assert all(gradient.dtype == torch.float32 for gradient in gradients(ours))
    _compared(ours, alone, 3e-2)


def test_mixed_precision(two: Run) -> None:
    two(_mixed_precision)


def _uneven() -> None:
    rank = dist.get_rank()
    ours, alone = _shard(Tasks()), Tasks()
    parts = [batch(r, size=3 + 2 * r) for r in range(2)]
    counts = [[3.0, 0.0, 3.0], [5.0, 5.0, 5.0]]
    sums = [
        output.square().sum() * (count > 0)
        for output, count in zip(ours(parts[rank])[1], counts[rank], strict=True)
    ]
    backward(global_means(sums, counts[rank]))
    whole = [alone(part)[1] for part in parts]
    backward(
        [
            sum(whole[r][i].square().sum() * (counts[r][i] > 0) for r in range(2))
            / sum(counts[r][i] for r in range(2))
            for i in range(TASKS)
        ]
    )
    for module in (ours, alone):
        jac_to_grad(module.parameters(), jdcore.get_aggregator("mgda"))
    _compared(ours, alone)


def test_uneven_batches_and_absent_tasks(two: Run) -> None:
    two(_uneven)


def _not_served() -> None:
    rank = dist.get_rank()
    ours = _shard(Tasks())
    losses = losses_of(ours(own_batch())[1])
    absent = [torch.zeros((), dtype=torch.float64), *losses[1:]] if rank else losses
    refused(ParameterError if rank else PeerError, r"0 \* output.sum", backward, absent)
    losses = losses_of(ours(own_batch())[1])
    refused(ParameterError, "by the same parameters", backward, losses[: 2 + rank])
    ours.set_requires_gradient_sync(False)
    refused(ParameterError, "set_requires_gradient_sync", backward, losses)
    ours.set_requires_gradient_sync(True)
    assert not gradients(ours)
    assert not any(hasattr(p, "jac") for p in ours.parameters())
    losses = losses_of(ours(own_batch())[1])
    backward(losses)

    def weighting(gramian: Tensor) -> Tensor:
        if rank:
            raise ValueError("no weights here")
        return gramian.diagonal()

    parameters = list(ours.parameters())
    error = ValueError if rank else PeerError
    refused(error, "no weights here", jac_to_grad, parameters, GramianAggregator(weighting))
    group = dist.group.WORLD
    refused(ParameterError, "mesh", jac_to_grad, parameters, weighting, group=group)
    assert not gradients(ours)
    jac_to_grad(parameters, GramianAggregator(_mean))
    assert gradients(ours)

    mixed = Tasks()
    fsdp.fully_shard(mixed.trunk)
    heads = [nn.parallel.DistributedDataParallel(head) for head in mixed.heads]
    features = mixed.trunk(own_batch())
    losses = losses_of([head(features) for head in heads])
    refused(ParameterError, "fully_shard to the heads", mtl_backward, losses, features)
    assert not gradients(mixed)

    # Heads that are not wrapped at all: nothing reduces their gradients, either.
    apart = Tasks()
    fsdp.fully_shard(apart.trunk)
    for chunk_size in (1, 3):
        features, outputs = apart(own_batch())
        losses = losses_of(outputs)
        chunked = partial(mtl_backward, parallel_chunk_size=chunk_size)
        refused(ParameterError, "tasks_params.*not reduced", chunked, losses, features)
        assert not gradients(apart)
        assert not any(hasattr(p, "jac") for p in apart.parameters())
    # The same on all processes, as of one batch, they need nobody.
    features, outputs = apart(batch(0))
    mtl_backward(losses_of(outputs), features)
    assert_identical(gradients(apart.heads))

    class Half(nn.Module):
        """A parameter that FSDP2 is told to ignore, so that nothing reduces its gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(5, 2).double(), nn.Parameter(torch.ones(2).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    half = Half()
    fsdp.fully_shard(half, ignored_params={half.scale})
    backward(half(own_batch()).square().mean(0))
    refused(ParameterError, "not reduced", jac_to_grad, half.parameters(), GramianAggregator(_mean))
    jac_to_grad(half.inner.parameters(), GramianAggregator(_mean))


def test_what_is_not_served_is_refused(two: Run) -> None:
    two(_not_served)


def _tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    parallel.parallelize_module(model.trunk, mesh, plan)
    return model


def _same_batch(step: int = 0) -> Tensor:
    return batch(0, step)


def _tensor_parallelism() -> None:
    """Heads and, in the trunk, the bias of the row-wise layer are the same on all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _tensor_parallel(Tasks(), mesh)
    losses = losses_of(model(_same_batch())[1])
    absent = [torch.zeros((), dtype=torch.float64), *losses[1:]] if dist.get_rank() else losses
    error = ParameterError if dist.get_rank() else PeerError
    refused(error, r"0 \* output.sum", backward, absent)
    refused(ParameterError, "parallel_chunk_size", backward, losses, parallel_chunk_size=2)
    assert not any(hasattr(p, "jac") for p in model.parameters())
    for name in ("upgrad", "trimmed_mean", "graddrop", "mean"):
        ours, alone = _tensor_parallel(Tasks(), mesh), Tasks()
        one, other = method_of(name, TASKS), method_of(name, TASKS)
        for step in range(2):
            _updates(ours, alone, one, other, step, _same_batch)
        _compared(ours, alone)
    ours, alone = _tensor_parallel(Tasks(), mesh), Tasks()
    for module in (ours, alone):
        features, outputs = module(_same_batch())
        mtl_backward(losses_of(outputs), features)
        jac_to_grad(module.trunk.parameters(), GramianAggregator(_mean))
    _compared(ours, alone)


def test_tensor_parallelism(two: Run) -> None:
    two(_tensor_parallelism)


def _two_dimensions() -> None:
    """Replicas of shards, and shards of tensor-parallel parameters."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name in ("upgrad", "trimmed_mean", "graddrop"):
        ours, alone = _shard(Tasks(), mesh=mesh), Tasks()
        one, other = method_of(name, TASKS), method_of(name, TASKS)
        for step in range(2):
            _updates(ours, alone, one, other, step)
        _compared(ours, alone)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name in ("upgrad", "mgda", "trimmed_mean"):
        ours, alone = _tensor_parallel(Tasks(), mesh["tensor"]), Tasks()
        _shard(ours, mesh=mesh["data"])
        for step in range(2):  # rows add up
            backward(losses_of(ours(batch(rank // 2, step))[1]))
            backward(losses_of(alone(torch.cat([batch(r, step) for r in range(2)]))[1]))
        jac_to_grad(ours.parameters(), method_of(name, TASKS))
        jac_to_grad(alone.parameters(), method_of(name, TASKS))
        _compared(ours, alone)


def test_meshes_of_two_dimensions(four: Run) -> None:
    four(_two_dimensions)


def _replicas_of_shards() -> None:
    """Twenty steps of Adam under autocast and with accumulation: replicas have the same bits."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = _shard(Tasks(torch.float32), mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    aggregator = jdcore.get_aggregator("pcgrad")  # draws numbers, on each process its own
    for step in range(20):
        for part in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                losses = losses_of(model(own_batch(2 * step + part, torch.float32))[1])
            backward([loss.float() for loss in losses])
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
    model.reshard()
    for parameter in model.parameters():
        part = parameter.to_local().detach().contiguous()
        others = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(others, part, group=mesh.get_group("replicate"))
        assert torch.equal(*others)


def test_replicas_of_shards_stay_identical(four: Run) -> None:
    four(_replicas_of_shards)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, TASKS)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x).tanh()).tanh())


class _Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, TASKS))


class _Partly(_Mlp):
    """A frozen parameter, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self[0].weight.requires_grad_(False)
        self.register_parameter("unused", nn.Parameter(torch.ones(3)))


class _Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, TASKS)

    def forward(self, x: Tensor) -> Tensor:
        words = x.repeat(1, 2)[:, :8].unsqueeze(1).expand(-1, 4, -1)
        return self.head(self.down(self.up(self.norm(words)).tanh()).mean(1))


def _by_second_dimension(module: nn.Module) -> nn.Module:
    def place(parameter: Tensor) -> Any:
        return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 2 == 0 else Shard(0)

    for child in module.children():
        fsdp.fully_shard(child, shard_placement_fn=place)
    return fsdp.fully_shard(module, shard_placement_fn=place)


def _grouped(module: nn.Module) -> nn.Module:
    fsdp.fully_shard([module[0], module[2]])
    return fsdp.fully_shard(module)


def _on_sequences(module: nn.Module) -> nn.Module:
    return parallel.parallelize_module(
        module,
        init_device_mesh("cpu", (2,)),
        {
            "norm": parallel.SequenceParallel(),
            "up": parallel.ColwiseParallel(input_layouts=Shard(1)),
            "down": parallel.RowwiseParallel(),
        },
    )


def _compared_steps(make: Any, wrap: Any, own: Any, whole: Any) -> None:
    torch.manual_seed(0)
    ours = make().double()
    torch.manual_seed(0)
    alone = make().double()
    wrapped = wrap(ours)
    for step in range(2):
        for module, data in ((wrapped, own(step)), (alone, whole(step))):
            backward((module(data) - 1).square().mean(0))
            jac_to_grad(module.parameters(), jdcore.get_aggregator("upgrad"))
    _compared(ours, alone)


def _other_modules() -> None:
    cases = [
        (_Tied, fsdp.fully_shard),
        (_Partly, fsdp.fully_shard),
        (_Mlp, _grouped),
        (_Mlp, _by_second_dimension),
    ]
    for make, wrap in cases:
        _compared_steps(make, wrap, own_batch, whole_batch)
    _compared_steps(_Sequence, _on_sequences, _same_batch, _same_batch)
    # Parameters that are the same on all processes, losses of a batch that is divided.
    mesh = init_device_mesh("cpu", (2,))

    def divided(step: int) -> Tensor:
        return DTensor.from_local(own_batch(step), mesh, [Shard(0)], run_check=False)

    _compared_steps(_Mlp, lambda m: distribute_module(m, mesh), divided, whole_batch)


def test_other_modules_and_placements(two: Run) -> None:
    two(_other_modules)
