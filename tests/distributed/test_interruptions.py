"""
A step that stops anywhere on one process stops on all, and leaves no trace.

One process counts the operations of a step until the last exchange; then the step is made again and
again, and each time another of these operations fails as if there were no memory for it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import jdcore
from jdcore import ParameterError, PeerError
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac, jac_to_grad, mtl_backward
from jdcore.errors import RowByRowWarning
from tests.distributed.common import (
    Tasks,
    assert_close,
    gradients,
    losses_of,
    own_batch,
    whole_batch,
)
from tests.distributed.conftest import Run

CULPRIT = 1
PLACES = 8


class _Broken(TorchDispatchMode):
    """Makes an operation fail; counts those before the last exchange."""

    def __init__(self, place: int | None = None) -> None:
        super().__init__()
        self.place = place
        self.count = self.before_last = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if "c10d" in str(operation):
            self.before_last = self.count
        elif not _in_fsdp():
            self.count += 1
            if self.count == self.place:
                raise RuntimeError(f"no memory for {operation}")
        return operation(*arguments, **(keywords or {}))


def _in_fsdp() -> bool:
    """Whether the operation is of an exchange of torch's own, which no meeting can precede."""
    frame: Any = sys._getframe()
    while frame is not None:
        if "_fully_shard" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _interrupted(
    prepare: Callable[[], Callable[[], None]], untouched: Callable[[], None], all_places: bool
) -> None:
    """
    :param prepare: Makes what a step needs, and gives the step.
    :param untouched: Checks that a step has left no trace.
    """
    me = dist.get_rank() == CULPRIT
    # What is looked for in the first calls of a kind, such as hooks, and now and then later, takes
    # operations more: the last place must be one of every step.
    for _ in range(9):
        prepare()()
    counts = []
    for _ in range(2):
        step = prepare()
        with _Broken() as whole:
            step()
        counts.append(whole.before_last)
    count = torch.tensor(min(counts))
    dist.broadcast(count, CULPRIT)
    assert count > 3
    stride = 1 if all_places else max(1, int(count) // PLACES)
    for place in range(1, int(count) + 1, stride):
        step = prepare()
        error = RuntimeError if me else PeerError
        with _Broken(place if me else None), pytest.raises(error, match="no memory") as caught:
            step()
        assert me or caught.value.rank == CULPRIT
        untouched()
    step = prepare()
    step()


def _aggregations(names: tuple[str, ...], wrap: Callable[[nn.Module], nn.Module]) -> None:
    for name in names:
        model = wrap(Tasks())
        method = jdcore.get_aggregator(name, **({"trim_number": 1} if "trim" in name else {}))
        before: list[Any] = []

        def prepare(
            model: Any = model, method: Any = method, before: list[Any] = before
        ) -> Callable[[], None]:
            model.zero_grad()
            for parameter in model.parameters():
                parameter.__dict__.pop("jac", None)
            features, outputs = model(own_batch())
            mtl_backward(losses_of(outputs), features)
            before[:] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            group = dist.group.WORLD if wrap is _plain else None
            return lambda: jac_to_grad(model.parameters(), method, group=group)

        def untouched(model: Any = model, before: list[Any] = before) -> None:
            assert all(torch.equal(p, q) for p, q in zip(gradients(model), before, strict=True))
            assert sum(hasattr(p, "jac") for p in model.parameters()) == 4

        _interrupted(prepare, untouched, all_places=name == "upgrad")


def _plain(model: nn.Module) -> nn.Module:
    return model


def _sharded(model: nn.Module) -> nn.Module:
    for part in (model.trunk, *model.heads):
        fully_shard(part)
    return model


def _replicated_aggregation() -> None:
    _aggregations(("upgrad", "trimmed_mean", "mean", "graddrop"), _plain)


def test_the_aggregation_of_replicated_parameters(two: Run) -> None:
    two(_replicated_aggregation)


def _sharded_aggregation() -> None:
    _aggregations(("upgrad", "trimmed_mean"), _sharded)


def test_the_aggregation_of_sharded_parameters(two: Run) -> None:
    two(_sharded_aggregation)


def _differentiations() -> None:
    """Where the rows are computed in the step itself."""
    model, group = Tasks(), dist.group.WORLD
    weighting = jdcore.get_weighting("upgrad")

    def by_tasks() -> Callable[[], None]:
        model.zero_grad()
        losses = losses_of(model(own_batch())[1])
        return lambda: gramian_backward(losses, weighting, group=group)

    engine = Engine(model, batch_dim=0)

    def by_samples() -> Callable[[], None]:
        model.zero_grad()
        losses = torch.cat(model(own_batch())[1], 1).square().sum(1)
        return lambda: engine.backward(losses, weighting, group=group)

    def untouched() -> None:
        assert not gradients(model)

    for prepare in (by_tasks, by_samples):
        _interrupted(prepare, untouched, all_places=False)


def test_steps_that_compute_their_rows(two: Run) -> None:
    two(_differentiations)


def _rows_of_shards() -> None:
    model = _sharded(Tasks())

    def prepare(differentiate: Any) -> Callable[[], None]:
        model.zero_grad()
        for parameter in model.parameters():
            parameter.__dict__.pop("jac", None)
        features, outputs = model(own_batch())
        losses = losses_of(outputs)
        return lambda: differentiate(features, losses)

    def untouched() -> None:
        assert not gradients(model)
        assert not any(hasattr(p, "jac") for p in model.parameters())

    for differentiate in (
        lambda features, losses: backward(losses),
        lambda features, losses: mtl_backward(losses, features),
    ):
        _interrupted(partial(prepare, differentiate), untouched, all_places=False)


def test_the_rows_of_sharded_parameters(two: Run) -> None:
    two(_rows_of_shards)


def _arguments_of_shards() -> None:
    """What is wrong on one process before it meets the others."""
    me, model = dist.get_rank() == CULPRIT, _sharded(Tasks())

    def refused(call: Callable[[Tensor, list[Tensor]], object]) -> None:
        features, outputs = model(own_batch())
        with pytest.raises(ParameterError if me else PeerError):
            call(features, losses_of(outputs))

    refused(lambda features, losses: backward(losses, parallel_chunk_size=0 if me else None))
    refused(lambda features, losses: jac(losses, features if me else [*model.parameters()]))
    wrong = {"grad_tensors": []} if me else {}
    refused(lambda features, losses: mtl_backward(losses, features, **wrong))
    nothing = [torch.zeros(())] * 3
    parameters = list(model.parameters())
    refused(lambda features, losses: backward(nothing if me else losses, inputs=parameters))
    backward(losses_of(model(own_batch())[1]))
    jac_to_grad(model.parameters(), jdcore.get_aggregator("upgrad"))
    assert gradients(model)


def test_arguments_that_are_wrong_on_one_process_of_shards(two: Run) -> None:
    two(_arguments_of_shards)


def _stopped(gradient: Tensor) -> Tensor:
    if dist.get_rank() == CULPRIT:
        raise ValueError("a hook stops the pass")
    return gradient


def _hooks() -> None:
    expected = pytest.raises(
        ValueError if dist.get_rank() == CULPRIT else PeerError, match="a hook stops the pass"
    )
    weighting, group = jdcore.get_weighting("upgrad"), dist.group.WORLD
    model = Tasks()
    features, outputs = model(own_batch())
    features.register_hook(_stopped)
    with expected:
        gramian_backward(losses_of(outputs), weighting, group=group)
    features, outputs = model(own_batch())
    features.register_hook(_stopped)
    with warnings.catch_warnings(), expected:
        warnings.simplefilter("ignore", RowByRowWarning)
        losses = torch.cat(outputs, 1).square().sum(1)
        Engine(model, batch_dim=0).backward(losses, weighting, group=group)
    assert not gradients(model)


def test_a_hook_that_stops_the_backward_pass_of_one_process(two: Run) -> None:
    two(_hooks)


def _hooks_of_shards() -> None:
    model = _sharded(Tasks())
    for differentiate in (
        lambda features, losses: backward(losses),
        lambda features, losses: mtl_backward(losses, features),
        lambda features, losses: gramian_backward(losses, jdcore.get_weighting("upgrad")),
    ):
        features, outputs = model(own_batch())
        features.register_hook(_stopped)
        error = ValueError if dist.get_rank() == CULPRIT else PeerError
        with pytest.raises(error, match="a hook stops the pass"):
            differentiate(features, losses_of(outputs))
        assert not gradients(model)
        assert not any(hasattr(p, "jac") for p in model.parameters())
    backward(losses_of(model(own_batch())[1]))


def test_a_hook_that_stops_the_backward_pass_of_one_process_of_shards(two: Run) -> None:
    two(_hooks_of_shards)


def _all_stopped(gradient: Tensor) -> Tensor:
    raise ValueError("hooks stop the pass")


def _passes_of_shards() -> None:
    """Accumulating passes, which FSDP2 takes part in, stop in the middle of a row on all."""
    model, whole = _sharded(Tasks()), Tasks()
    for differentiate in (
        lambda features, losses: backward(losses, parallel_chunk_size=1),
        lambda features, losses: mtl_backward(losses, features, parallel_chunk_size=1),
    ):
        features, outputs = model(own_batch())
        features.register_hook(_all_stopped)
        with pytest.raises(ValueError, match="hooks stop the pass"):
            differentiate(features, losses_of(outputs))
        assert not gradients(model)
        assert not any(hasattr(p, "jac") for p in model.parameters())
        # Later steps, of both kinds, do not know of it.
        backward(losses_of(model(own_batch())[1]), parallel_chunk_size=1)
        jac_to_grad(model.parameters(), jdcore.get_aggregator("mean"))
        torch.stack(losses_of(model(own_batch())[1])).mean().backward()
        whole.zero_grad()
        torch.stack(losses_of(whole(whole_batch())[1])).mean().mul(2.0).backward()
        assert_close(gradients(model), gradients(whole))
        model.zero_grad()


def test_a_pass_that_stops_on_all_processes_of_shards_leaves_nothing(two: Run) -> None:
    two(_passes_of_shards)
