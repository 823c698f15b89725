"""Methods around other methods, those too that have no weights, draw numbers or keep a history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import jdcore
from jdcore.autojac import backward, jac_to_grad
from tests.distributed.common import (
    Tasks,
    assert_close,
    gradients,
    losses_of,
    own_batch,
    whole_batch,
)
from tests.distributed.conftest import Run

pytestmark = pytest.mark.slow

COUNT = 6


def _inner() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    trimmed = jdcore.get_aggregator("trimmed_mean", trim_number=1)
    return [
        trimmed,
        jdcore.get_aggregator("graddrop", generator=generator),
        jdcore.get_aggregator("random", generator=generator),
        jdcore.get_aggregator("row_momentum", weighting=jdcore.get_weighting("mgda")),
        jdcore.get_aggregator("cagrad", c=0.4),
        lambda matrix: matrix.median(0).values,
    ]


def _wrapped() -> Iterator[tuple[str, Any]]:
    """Every wrapper around each of these methods that it takes."""
    for name in jdcore.list_aggregators():
        spec = jdcore.describe(name)
        arguments = dict(spec.example(COUNT))
        if not (spec.wrapper and "aggregator" in arguments):
            continue
        for i, inner in enumerate(_inner()):
            if spec.stochastic:
                arguments["generator"] = torch.Generator().manual_seed(4)
            try:
                method = jdcore.get_aggregator(name, **{**arguments, "aggregator": inner})
            except jdcore.ParameterError:
                continue  # one that takes weightings only
            yield f"{name} around {i}", method


def _compared(wrap: Callable[[nn.Module], nn.Module]) -> None:
    pairs = list(zip(_wrapped(), _wrapped(), strict=True))
    assert len(pairs) > 25
    for (name, ours), (_, theirs) in pairs:
        module, alone = wrap(Tasks(tasks=COUNT)), Tasks(tasks=COUNT)
        for step in range(2):
            for model, method, of in ((module, ours, own_batch), (alone, theirs, whole_batch)):
                losses = losses_of(model(of(step))[1])
                backward(losses)
                jac_to_grad(model.parameters(), method, losses=losses)
        try:
            assert_close(gradients(module), gradients(alone))
        except AssertionError as error:
            raise AssertionError(name) from error


def _replicated() -> None:
    _compared(DistributedDataParallel)


def _sharded() -> None:
    _compared(fully_shard)


def test_wrappers_of_replicated_parameters(two: Run) -> None:
    two(_replicated)


def test_wrappers_of_sharded_parameters(two: Run) -> None:
    two(_sharded)
