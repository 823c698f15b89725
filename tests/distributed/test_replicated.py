"""Data parallelism: the update of one process on the whole batch, on every process."""

from __future__ import annotations

import copy
import gc
import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import jdcore
from jdcore import ParameterError, PeerError
from jdcore.aggregation import GramianAggregator
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac, jac_to_grad, mtl_backward
from jdcore.distributed import _transfers, global_means
from tests.distributed.common import (
    TASKS,
    Tasks,
    assert_close,
    assert_identical,
    batch,
    compare_every_method,
    gradients,
    losses_of,
    own_batch,
    refused,
    whole_batch,
)
from tests.distributed.conftest import Run
from tests.functions import AFTER_ACCUMULATION


def _mean(gramian: Tensor) -> Tensor:
    return gramian.diagonal().rsqrt()


def _known(name: str, module: nn.Module, losses: list[Tensor], other: Tensor) -> dict[str, Any]:
    """What else a method may look at: the losses, and the Jacobian of a second batch."""
    known: dict[str, Any] = {"losses": losses}
    if jdcore.describe(name).input == "cross_gramian":
        known["second"] = jac(losses_of(module(other)[1]), list(module.parameters()))
    return known


def _every_method(dtype: torch.dtype, tolerance: float) -> None:
    compare_every_method(DistributedDataParallel, _compared, dtype, tolerance)


def _compared(ours: nn.Module, alone: nn.Module, tolerance: float) -> None:
    assert_close(gradients(ours), gradients(alone), tolerance)
    assert_identical(gradients(ours))


def _every_method_in_float64() -> None:
    _every_method(torch.float64, 1e-12)


def _every_method_in_float32() -> None:
    _every_method(torch.float32, 1e-6)


def test_every_method_in_float64(two: Run) -> None:
    two(_every_method_in_float64)


def test_every_method_in_float32(two: Run) -> None:
    two(_every_method_in_float32)


@pytest.mark.slow
def test_every_method_on_four_processes(four: Run) -> None:
    four(_every_method_in_float64)


def _equal_to_one_process() -> None:
    ours, alone = DistributedDataParallel(Tasks()), Tasks()
    backward(losses_of(ours(own_batch())[1]))
    weights = jac_to_grad(ours.parameters(), GramianAggregator(_mean))
    backward(losses_of(alone(whole_batch())[1]))
    expected = jac_to_grad(alone.parameters(), GramianAggregator(_mean))
    assert_close([weights], [expected])
    assert_close(gradients(ours), gradients(alone))
    assert len(gradients(ours)) == len(list(ours.parameters()))
    assert_identical(gradients(ours))
    assert not any(hasattr(p, "jac") for p in ours.parameters())


def test_the_update_is_that_of_one_process_on_the_whole_batch(two: Run) -> None:
    two(_equal_to_one_process)


def test_also_on_four_processes(four: Run) -> None:
    four(_equal_to_one_process)


def _heads() -> None:
    ours, alone = DistributedDataParallel(Tasks()), Tasks()
    for step in range(2):  # twice: gradients add up
        for module, data in ((ours, own_batch(step)), (alone, whole_batch(step))):
            features, outputs = module(data)
            mtl_backward(losses_of(outputs), features)
            shared = [p for p in module.parameters() if hasattr(p, "jac")]
            assert len(shared) == 4
            jac_to_grad(shared, GramianAggregator(_mean))
    assert_close(gradients(ours), gradients(alone))
    assert_identical(gradients(ours))


def test_the_gradients_of_heads_are_averaged_with_the_jacobian(two: Run) -> None:
    two(_heads)


def _absent_head() -> None:
    """A task without samples on a process: no gradient of its head, a zero row of the trunk."""
    ours, alone = DistributedDataParallel(Tasks()), Tasks()
    absent = dist.get_rank() + 1  # another one on each process

    def losses(module: Any, data: Tensor, without: int | None) -> tuple[Tensor, list[Tensor]]:
        features, outputs = module(data)
        results = losses_of(outputs)
        if without is not None:
            results[without] = torch.zeros((), dtype=torch.float64)
        return features, results

    features, own = losses(ours, own_batch(), absent)
    mtl_backward(own, features)
    jac_to_grad(ours.parameters(), GramianAggregator(_mean))
    total = [torch.zeros((), dtype=torch.float64) for _ in range(TASKS)]
    parts = [losses(alone, batch(rank), rank + 1) for rank in range(2)]
    total = [sum(part[1][i] for part in parts) / 2 for i in range(TASKS)]
    backward(total, inputs=alone.trunk.parameters(), retain_graph=True)
    heads = list(alone.heads.parameters())
    for head, gradient in zip(heads, torch.autograd.grad(sum(total), heads), strict=True):
        head.grad = gradient
    jac_to_grad(alone.trunk.parameters(), GramianAggregator(_mean))
    assert_close(gradients(ours), gradients(alone))
    assert_identical(gradients(ours))


def test_a_task_may_be_absent_from_a_process(two: Run) -> None:
    two(_absent_head)


def _uneven() -> None:
    rank = dist.get_rank()
    ours, alone = DistributedDataParallel(Tasks()), Tasks()
    for step in range(3):
        parts = [batch(r, step, size=3 + 2 * r) for r in range(2)]
        masks = [_mask(len(part), 9 + 10 * step + r) for r, part in enumerate(parts)]
        masks[0][:, 1] = False  # absent from one process
        for mask in masks:
            mask[:, 2] &= step < 2  # absent from all

        def sums(module: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            errors = (torch.cat(module(x)[1], 1) - 1) ** 2
            return (errors * mask).sum(0), mask.sum(0)

        backward(global_means(*sums(ours, parts[rank], masks[rank])))
        total, count = sums(alone, torch.cat(parts), torch.cat(masks))
        backward(list(total / count.clamp_min(1)))
        for module in (ours, alone):
            jac_to_grad(module.parameters(), jdcore.get_aggregator("upgrad"))
        assert_close(gradients(ours), gradients(alone), 1e-11)
        for module in (ours, alone):
            torch.optim.SGD(module.parameters(), 1e-2).step()
            module.zero_grad()
    refused(
        ParameterError if rank else PeerError, "counts", global_means, [total[0]], [1 - 2 * rank]
    )
    refused(
        ParameterError,
        "same number of tasks",
        global_means,
        list(total[: 1 + rank]),
        [1] * (1 + rank),
    )


def _mask(size: int, seed: int) -> Tensor:
    return torch.rand(size, TASKS, generator=torch.Generator().manual_seed(seed)) > 0.4


def test_uneven_batches_and_absent_tasks_by_the_losses(two: Run) -> None:
    two(_uneven)


def _twenty_steps() -> None:
    """Adam, gradient accumulation and checkpointing together; nothing drifts."""
    ours, alone = DistributedDataParallel(Tasks()), Tasks()
    optimizers = [torch.optim.Adam(module.parameters(), 1e-2) for module in (ours, alone)]
    aggregators = [jdcore.get_aggregator("upgrad") for _ in range(2)]
    for step in range(20):
        for module, of, optimizer, aggregator in zip(
            (ours, alone), (own_batch, whole_batch), optimizers, aggregators, strict=True
        ):
            for part in range(2):
                with module.no_sync() if module is ours else nullcontext():
                    inner = module.module if module is ours and part else module
                    outputs = checkpoint(inner, of(2 * step + part), use_reentrant=False)[1]
                    backward([loss / 2 for loss in losses_of(outputs)])
            jac_to_grad(module.parameters(), aggregator)
            optimizer.step()
            optimizer.zero_grad()
    assert_close(ours.parameters(), alone.parameters(), 1e-9)
    assert_identical(ours.parameters())


def test_parameters_stay_identical_over_twenty_steps_of_adam(two: Run) -> None:
    two(_twenty_steps)


def _all_together() -> None:
    """Adam, accumulation, checkpointing and autocast: the same bits on all processes."""
    for name in ("upgrad", "graddrop"):
        model = DistributedDataParallel(Tasks(torch.float32))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        aggregator = jdcore.get_aggregator(name)
        for step in range(20):
            for part in range(2):
                data = own_batch(2 * step + part, torch.float32)
                with model.no_sync(), torch.autocast("cpu", torch.bfloat16):
                    outputs = checkpoint(model, data, use_reentrant=False)[1]
                    losses = losses_of(outputs)
                backward([1024.0 * loss.float() for loss in losses])
            jac_to_grad(model.parameters(), aggregator)
            optimizer.step()
            optimizer.zero_grad()
        assert_identical(model.parameters())


def test_all_of_a_training_loop_together(two: Run) -> None:
    two(_all_together)


def test_all_of_a_training_loop_together_on_four_processes(four: Run) -> None:
    four(_all_together)


def _mixed_precision() -> None:
    ours, alone = DistributedDataParallel(Tasks(torch.float32)), Tasks(torch.float32)
    for module, data in ((ours, own_batch()), (alone, whole_batch())):
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(module(data.float())[1])
        backward([1024.0 * loss.float() for loss in losses])
        jac_to_grad(module.parameters(), GramianAggregator(_mean))
    assert_close(gradients(ours), gradients(alone), 2e-2)
    assert_identical(gradients(ours))


def test_automatic_mixed_precision(two: Run) -> None:
    two(_mixed_precision)


class _Dtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 9).double(), nn.Linear(9, 7), nn.Linear(7, 3).double()

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.c(self.b(self.a(x).tanh().float()).tanh().double()).square().mean(0))


def _group() -> None:
    """Plain parameters of two dtypes in a group of some of the processes, bucket by bucket."""
    group = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        refused(ParameterError, "group", jac_to_grad, [torch.ones(1)], _mean, group=group)
        return
    for size in (25 << 20, 900, 1):
        _transfers._BYTES = size
        ours, alone = _Dtypes(), _Dtypes()
        backward(ours(batch(dist.get_rank())))
        jac_to_grad(ours.parameters(), GramianAggregator(_mean), group=group)
        backward(alone(torch.cat([batch(1), batch(3)])))
        jac_to_grad(alone.parameters(), GramianAggregator(_mean))
        assert_close(gradients(ours), gradients(alone), 1e-6)
    _transfers._BYTES = 25 << 20


def test_a_group_of_some_processes(four: Run) -> None:
    four(_group)


def _plain_parameters_stay_local() -> None:
    ours, alone = Tasks(), Tasks()
    for module in (ours, alone):
        backward(losses_of(module(own_batch())[1]))
    DistributedDataParallel(nn.Linear(1, 1))  # another one does no harm
    jac_to_grad(ours.parameters(), lambda matrix: matrix.mean(0))
    jac_to_grad(alone.parameters(), lambda matrix: matrix.mean(0))
    assert_close(gradients(ours), gradients(alone), 0.0)
    # Wrapped only now: seen all the same.
    wrapped = DistributedDataParallel(ours)
    backward(losses_of(wrapped(own_batch())[1]))
    jac_to_grad(wrapped.parameters(), GramianAggregator(_mean))
    wrapped.zero_grad()
    backward(losses_of(wrapped(own_batch())[1]))
    jac_to_grad(ours.parameters(), GramianAggregator(_mean))
    assert_identical(gradients(ours))


def test_plain_parameters_stay_with_their_process(two: Run) -> None:
    two(_plain_parameters_stay_local)


def _options() -> None:
    """What DistributedDataParallel can be told, and ordinary steps in between."""
    for first, options in (
        (0, {}),
        (0, {"find_unused_parameters": True}),
        (0, {"gradient_as_bucket_view": True}),
        (1, {"static_graph": True}),  # an ordinary step has to show it the graph
    ):
        ours, alone = DistributedDataParallel(Tasks(), **options), Tasks()
        for step in range(first, 4 + first):
            for module, of in ((ours, own_batch), (alone, whole_batch)):
                module.zero_grad()
                losses = losses_of(module(of(step))[1])
                if step % 2:
                    sum(losses).backward()
                else:
                    backward(losses)
                    jac_to_grad(module.parameters(), GramianAggregator(_mean))
            assert_close(gradients(ours), gradients(alone))
            assert_identical(gradients(ours))


def test_options_of_the_wrapper(two: Run) -> None:
    two(_options)


def _not_served() -> None:
    static = DistributedDataParallel(Tasks(), static_graph=True)
    losses = losses_of(static(own_batch())[1])
    refused(ParameterError, "static_graph.*model.module", backward, losses)
    backward(losses_of(static.module(own_batch())[1]))  # past the wrapper
    jac_to_grad(static.parameters(), GramianAggregator(_mean))
    assert_identical(gradients(static))

    sink = DistributedDataParallel(Tasks(), find_unused_parameters=True)
    features, outputs = sink(own_batch())
    refused(
        ParameterError, "wrap the trunk and each head", mtl_backward, losses_of(outputs), features
    )
    apart = Tasks()
    trunk = DistributedDataParallel(apart.trunk, find_unused_parameters=True)
    heads = [DistributedDataParallel(head) for head in apart.heads]
    features = trunk(own_batch())
    mtl_backward(losses_of([head(features) for head in heads]), features)
    refused(
        ParameterError,
        "Pass all parameters",
        jac_to_grad,
        trunk.parameters(),
        GramianAggregator(_mean),
    )
    jac_to_grad(apart.parameters(), GramianAggregator(_mean))
    assert_identical(gradients(apart))

    # An optimizer that steps as soon as a gradient is there would step before it is averaged.
    bias = apart.heads[0].bias
    features = trunk(own_batch())
    losses = losses_of([head(features) for head in heads])
    for register in AFTER_ACCUMULATION:
        hook = register(bias, lambda parameter: None)
        refused(ParameterError, "after that", mtl_backward, losses, features)
        hook.remove()
    mtl_backward(losses, features)
    jac_to_grad(apart.parameters(), GramianAggregator(_mean))

    # The wrapper itself steps such optimizers, as soon as its reducer has averaged. The module
    # warns where it is imported, which is not done by the tests of one process therefore.
    from torch.distributed.optim import _apply_optimizer_in_backward

    stepped = Tasks()
    _apply_optimizer_in_backward(torch.optim.SGD, stepped.parameters(), {"lr": 0.1})
    wrapped = DistributedDataParallel(stepped)
    losses = losses_of(wrapped(own_batch())[1])
    refused(ParameterError, "never step", backward, losses)

    joined = DistributedDataParallel(Tasks())
    with pytest.raises(ParameterError, match="join"), joined.join():
        backward(losses_of(joined(own_batch())[1]))
    assert not any(hasattr(p, "jac") for p in joined.parameters())
    with joined.join(enable=False):
        backward(losses_of(joined(own_batch())[1]))

    model = Tasks()
    wrapper = DistributedDataParallel(model)
    single = wrapper(own_batch())[1][0].squeeze(1)
    refused(ParameterError, "drift apart", Engine(model, batch_dim=0).compute_gramian, single)
    mixed = [*wrapper.parameters(), nn.Parameter(torch.ones(2))]
    refused(ParameterError, "outside of them", jac_to_grad, mixed, GramianAggregator(_mean))
    assert all(p.grad is None for p in mixed)
    refused(ParameterError, "group", jac_to_grad, mixed, _mean, group="world")


def test_what_is_not_served_is_refused(two: Run) -> None:
    two(_not_served)


def _without_rows_kept() -> None:
    ours, alone = DistributedDataParallel(Tasks()), Tasks()
    for method in ("upgrad", "mean"):
        for module, data in ((ours, own_batch()), (alone, whole_batch())):
            module.zero_grad()
            losses = losses_of(module(data)[1])
            gramian_backward(losses, jdcore.get_weighting(method))
        assert_close(gradients(ours), gradients(alone))
        assert_identical(gradients(ours))


def test_gramian_backward(two: Run) -> None:
    two(_without_rows_kept)


def _unshared_seeds() -> None:
    """Every process draws other numbers; those of the first count."""
    for name in jdcore.list_aggregators():
        spec = jdcore.describe(name)
        if not spec.stochastic:
            continue
        tasks = max(TASKS, spec.min_rows)
        model = DistributedDataParallel(Tasks(tasks=tasks))
        arguments = dict(spec.example(tasks))
        arguments["generator"] = torch.Generator().manual_seed(dist.get_rank())
        method = jdcore.get_aggregator(name, **arguments)
        for step in range(2):
            losses = losses_of(model(own_batch(step))[1])
            backward(losses)
            jac_to_grad(model.parameters(), method, **_known(name, model, losses, own_batch(9)))
            assert_identical(gradients(model))


def test_random_numbers_need_no_shared_seed(two: Run) -> None:
    two(_unshared_seeds)


def _same_as_alone(wrapped: nn.Module) -> None:
    alone = Tasks()
    for module, of in ((wrapped, own_batch), (alone, whole_batch)):
        module.zero_grad()
        backward(losses_of(module(of())[1]))
        jac_to_grad(module.parameters(), GramianAggregator(_mean))
    assert_close(gradients(wrapped), gradients(alone))


def _wrappers_come_and_go() -> None:
    """Copies and loaded wrappers, new ones of the same module, and those that only one has."""
    first = DistributedDataParallel(Tasks())
    _same_as_alone(first)
    _same_as_alone(copy.deepcopy(first))
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    _same_as_alone(torch.load(file, weights_only=False))
    # Another wrapper of the same module, which goes again.
    other = DistributedDataParallel(first.module)
    _same_as_alone(other)
    del other
    gc.collect()
    _same_as_alone(first)
    # A wrapper whose processes are no group any longer.
    group = dist.new_group()
    module = Tasks()
    old = DistributedDataParallel(module, process_group=group)
    _same_as_alone(old)
    dist.destroy_process_group(group)
    _same_as_alone(DistributedDataParallel(module))
    # One that only the first process keeps, as garbage may be collected on others alone.
    if dist.get_rank():
        del first, old
        gc.collect()
    wrapped = DistributedDataParallel(Tasks())
    _same_as_alone(wrapped)
    losses = wrapped(own_batch())[1][0].square().sum(1)
    Engine(wrapped, batch_dim=0).backward(losses, _mean)
    assert_identical(gradients(wrapped))


def test_wrappers_come_and_go(two: Run) -> None:
    two(_wrappers_come_and_go)
