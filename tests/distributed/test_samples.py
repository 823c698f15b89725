"""One loss per sample, the samples on several processes: the step of one process that has all."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import jdcore
from jdcore import ParameterError, PeerError, autogram
from jdcore.aggregation import Flattening
from jdcore.autogram import Engine
from jdcore.autojac import gramian_backward
from jdcore.errors import RowByRowWarning
from tests.distributed.common import assert_close, assert_identical, gradients, refused
from tests.distributed.conftest import Run


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1))


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 1),
    )


class _Sentences(nn.Module):
    """A table that is looked up and used again as the output layer, and rows of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 4), nn.Parameter(torch.rand(4))
        self.recurrent = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states = self.recurrent(self.table(x) * self.scale)[0]
        return (states @ self.table.weight.T).logsumexp(2).mean(1, keepdim=True)


def _numbers(sizes: list[int], width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64) for size in sizes]


def _words(sizes: list[int], lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    pairs = zip(sizes, lengths, strict=True)
    return [torch.randint(0, 7, pair, generator=generator) for pair in pairs]


def _replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _sharded(model: nn.Module, **options: Any) -> nn.Module:
    for child in model if isinstance(model, nn.Sequential) else ():
        fully_shard(child, **options)
    return fully_shard(model, **options)


def _compared(
    make: Callable[[], nn.Module],
    parts: list[Tensor],
    method: str,
    wrap: Callable[[nn.Module], nn.Module] = _replicated,
) -> None:
    torch.manual_seed(0)
    ours = make().double()
    torch.manual_seed(0)
    alone = make().double()
    weighting = jdcore.get_weighting(method)
    wrapped = wrap(ours)
    losses = wrapped(parts[dist.get_rank()]).squeeze(1).square()
    weights = Engine(ours, batch_dim=0).backward(losses, weighting)
    whole = [alone(part).squeeze(1).square() for part in parts]
    expected = Engine(alone, batch_dim=0).backward(torch.cat(whole), jdcore.get_weighting(method))
    assert_close([weights], [expected], 1e-9)
    if wrap is not _replicated:
        ours.reshard()
    assert_close(gradients(ours), gradients(alone), 1e-9)
    assert len(gradients(ours)) == len(gradients(alone))
    assert_identical(gradients(ours))


def _layers() -> None:
    size = dist.get_world_size()
    uneven = [2 + rank for rank in range(size)]
    for method in ("upgrad", "mean"):
        _compared(_perceptron, _numbers([4] * size, 5), method)
        _compared(_perceptron, _numbers(uneven, 5), method)
        _compared(_convolution, _numbers(uneven, 12), method)
        _compared(_Sentences, _words(uneven, [3] * size), method)


def _other_lengths() -> None:
    """Sentences that are longer on one process: what cannot lie side by side goes as rows."""
    _compared(_Sentences, _words([3, 4], [3, 5]), "upgrad")


def test_samples_of_different_shapes(two: Run) -> None:
    two(_other_lengths)


def _one_layer() -> None:
    """Fewer shares than processes: some of them own none of those that are sent as factors."""
    _compared(lambda: nn.Linear(5, 1), _numbers([4] * dist.get_world_size(), 5), "upgrad")


def test_fewer_layers_than_processes(two: Run) -> None:
    two(_one_layer)


def _few() -> None:
    """One sample, or none at all, on some of the processes."""
    size = dist.get_world_size()
    for sizes in ([1] * size, [3, 1], [0, 3], [2, 0], [1, 0]):
        sizes = sizes + [2] * (size - len(sizes))
        _compared(_perceptron, _numbers(sizes, 5), "upgrad")
    _compared(_convolution, _numbers([1, 4], 12), "mgda")
    _compared(_Sentences, _words([1, 2], [3, 3]), "mean")


def test_few_samples_on_a_process(two: Run) -> None:
    two(_few)


def _shards() -> None:
    """Parameters under FSDP2: gathered for the step, each process writes its part."""
    size = dist.get_world_size()
    meshes = [{}, {"reshard_after_forward": False}]
    if size == 4:
        meshes = [{"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}]
    for options in meshes:
        wrap = partial(_sharded, **options)
        uneven = [2 + rank for rank in range(size)]
        _compared(_perceptron, _numbers(uneven, 5), "upgrad", wrap)
        _compared(_convolution, _numbers(uneven, 12), "mgda", wrap)
        _compared(_Sentences, _words(uneven, [3] * size), "mean", wrap)
        _compared(_perceptron, _numbers([1, 0, 2, 3][:size], 5), "upgrad", wrap)


def test_parameters_under_fsdp(two: Run) -> None:
    two(_shards)


def _left_over() -> None:
    """A module that one process has and the garbage collector of the other took away."""
    left = [_sharded(_perceptron())]
    if dist.get_rank() == 1:
        left.clear()
        gc.collect()
    _compared(_perceptron, _numbers([2, 3], 5), "upgrad", _sharded)


def test_other_modules_under_fsdp_do_not_matter(two: Run) -> None:
    two(_left_over)


def test_parameters_under_fsdp_with_replicas(four: Run) -> None:
    four(_shards)


def _hooks() -> None:
    """A hook in the graph acts on each loss by itself, and its rows are exchanged."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 300), nn.Linear(300, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).tanh()
            hidden.register_hook(lambda gradient: gradient * gradient.norm())
            return self.last(hidden)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RowByRowWarning)
        for wrap in (_replicated, fully_shard):
            _compared(Hooked, _numbers([2, 3], 5), "upgrad", wrap)


def test_hooks_in_the_graph(two: Run) -> None:
    two(_hooks)


def _tasks() -> None:
    """Losses of samples and tasks, in both orders; a group in place of the wrapper."""
    for dimension in (0, 1):
        torch.manual_seed(0)
        ours = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double()
        alone = copy.deepcopy(ours)
        parts = _numbers([3, 5], 5)
        weightings = [Flattening(jdcore.get_weighting("upgrad")) for _ in range(2)]

        def losses(module: nn.Module, data: Tensor, dimension: int = dimension) -> Tensor:
            found = module(data).square()
            return found if dimension == 0 else found.T

        engine = Engine(ours, batch_dim=dimension)
        own = losses(ours, parts[dist.get_rank()])
        weights = engine.backward(own, weightings[0], group=dist.group.WORLD)
        engine = Engine(alone, batch_dim=dimension)
        expected = engine.backward(losses(alone, torch.cat(parts)), weightings[1])
        assert weights.shape == expected.shape == ((8, 3) if dimension == 0 else (3, 8))
        assert_close([weights], [expected], 1e-9)
        assert_close(gradients(ours), gradients(alone), 1e-9)


def test_samples_and_tasks(two: Run) -> None:
    two(_tasks)


def _per_process() -> None:
    parts = _numbers([3, 5], 5)
    torch.manual_seed(0)
    ours = _perceptron().double()
    alone = copy.deepcopy(ours)
    losses = ours(parts[dist.get_rank()]).squeeze(1).square()
    weighting = jdcore.get_weighting("upgrad")
    group = dist.group.WORLD
    weights = Engine(ours, batch_dim=0).backward(losses, weighting, group=group, per_process=True)
    assert len(weights) == len(losses)
    for part in parts:
        Engine(alone, batch_dim=0).backward(alone(part).squeeze(1).square() / 2, _halved)
    assert_close(gradients(ours), gradients(alone), 1e-9)


def _halved(gramian: Tensor) -> Tensor:
    """UPGrad of losses that were halved, as for those that were not: its weights do not change."""
    return jdcore.get_weighting("upgrad")(gramian)


def test_weights_for_each_process_by_itself(two: Run) -> None:
    two(_per_process)


def _second_pass() -> None:
    model = _perceptron()
    engine, group = Engine(model, batch_dim=0), dist.group.WORLD
    losses = model(torch.ones(3, 5)).squeeze(1)
    with pytest.raises(ParameterError, match="`second_pass` must be False"):
        engine.backward(losses, _halved, group=group, second_pass=True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_second_pass_is_refused(two: Run) -> None:
    two(_second_pass)


def _failures() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    model = _perceptron().double()
    engine = Engine(model, batch_dim=0)
    parts = _numbers([3, 3], 5)

    def losses(samples: int = 3) -> Tensor:
        return model(parts[rank][:samples]).squeeze(1).square()

    def broken(gramian: Tensor) -> Tensor:
        if rank:
            raise ValueError("no weights here")
        return gramian.diagonal()

    own = ValueError if rank else PeerError
    refused(own, "no weights here", engine.backward, losses(), broken, group=group)
    tasks = Engine(model, batch_dim=None)
    refused(ParameterError, "gramian_backward", tasks.backward, losses(), torch.diag, group=group)
    output = losses()[None] if rank else losses()
    refused(ParameterError, "same shape", engine.backward, output, torch.diag, group=group)
    part = model[:3] if rank else model
    other = Engine(part, batch_dim=0)
    own = part(parts[rank]).square().sum(1)
    refused(ParameterError, "in the same order", other.backward, own, torch.diag, group=group)
    assert not gradients(model)
    engine.backward(losses(), torch.diag, group=group)
    assert_identical(gradients(model))


def test_failures(two: Run) -> None:
    two(_failures)


def test_layers_of_all_kinds(two: Run) -> None:
    two(_layers)


def test_also_on_four_processes(four: Run) -> None:
    four(_layers)


class _Dropping(nn.Module):
    """Layers of one shape, of which each process may use others, or in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 9), nn.Linear(9, 1)
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(9, 9)) for _ in range(2))

    def forward(self, x: Tensor, way: list[str]) -> Tensor:
        hidden = self.first(x).tanh()
        for layer in way:
            weight = self.layers[int(layer[0])]
            hidden = (hidden @ (weight.T if layer[1:] else weight)).tanh()
        return self.last(hidden).squeeze(1).square()


def _other_ways() -> None:
    """Each process goes through other layers, or through the same in another way."""
    rank, group = dist.get_rank(), dist.group.WORLD
    weighting = jdcore.get_weighting("upgrad")
    same = ["0", "1T", "0"]
    others = [["0"], ["1"]], [["0", "1"], ["1", "0"]], [["0"], ["0T"]], [["0", "1"], ["1"]]
    for ways, sizes in itertools.product(([same, same], *others), ([3, 4], [1, 4])):
        parts = _numbers(sizes, 5)
        torch.manual_seed(0)
        ours = _Dropping().double()
        alone = copy.deepcopy(ours)
        engine = Engine(ours, batch_dim=0)
        try:
            engine.backward(ours(parts[rank], ways[rank]), weighting, group=group)
        except ParameterError:
            assert ways != [same, same]
            assert not gradients(ours)
            continue
        whole = [alone(part, way) for part, way in zip(parts, ways, strict=True)]
        Engine(alone, batch_dim=0).backward(torch.cat(whole), weighting)
        assert_close(gradients(ours), gradients(alone), 1e-9)
    losses = ours(_numbers([3, 4], 5)[rank], str(rank))
    refused(
        ParameterError,
        "same parameters",
        engine.backward,
        losses,
        weighting,
        per_process=True,
        group=group,
    )


def test_other_layers_on_each_process_are_right_or_refused(two: Run) -> None:
    two(_other_ways)


def _leaves_of_one_process() -> None:
    rank, weighting = dist.get_rank(), jdcore.get_weighting("upgrad")
    torch.manual_seed(0)
    ours = _perceptron().double()
    alone = copy.deepcopy(ours)
    model = DistributedDataParallel(ours)
    for sizes, per_process in itertools.product(([3, 4], [1, 4]), (False, True)):
        parts = [part.requires_grad_() for part in _numbers(sizes, 5)]
        ours.zero_grad()
        alone.zero_grad()
        noise = torch.zeros(sizes[rank], 1, dtype=torch.float64, requires_grad=True) * 1.0
        noise.retain_grad()
        losses = (model(parts[rank]) + noise).squeeze(1).square()
        Engine(model, batch_dim=0).backward(losses, weighting, per_process=per_process)
        of_ours, parts = parts[rank].grad, [part.detach().requires_grad_() for part in parts]
        whole = [alone(part).squeeze(1).square() for part in parts]
        for output in whole if per_process else [torch.cat(whole)]:
            Engine(alone, batch_dim=0).backward(output, weighting)
        if per_process:
            for parameter in alone.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad / 2
        assert_close(gradients(ours), gradients(alone), 1e-9)
        assert of_ours is not None
        assert noise.grad is not None
        assert_close([of_ours], [parts[rank].grad], 1e-9)
    inputs = _numbers([3, 4], 5)[rank].requires_grad_()
    function = partial(autogram.backward, batch_dim=0)
    losses = model(inputs).squeeze(1).square()
    engine = Engine(model, batch_dim=0)
    refused(ParameterError, "drift apart", engine.compute_gramian, losses)
    assert engine.verify(losses).worst < 1e-12
    refused(ParameterError, "same on all", function, losses, weighting)
    function(losses, weighting, inputs=list(ours.parameters()))
    losses = alone(inputs[:2]).squeeze(1).square()
    refused(ParameterError, "same", gramian_backward, losses, weighting, group=dist.group.WORLD)
    assert inputs.grad is None


def test_what_only_one_process_has_gets_its_own_gradient(two: Run) -> None:
    two(_leaves_of_one_process)


def _heads() -> None:
    """A head outside of the engine: the same on all processes, or another one on each."""
    rank, weighting = dist.get_rank(), jdcore.get_weighting("upgrad")
    torch.manual_seed(0)
    trunk, alone = _perceptron().double(), _perceptron().double()
    alone.load_state_dict(trunk.state_dict())
    heads = [nn.Linear(1, 1).double() for _ in range(2)]
    single = copy.deepcopy(heads[0])
    model, parts = DistributedDataParallel(trunk), _numbers([3, 4], 5)
    engine = Engine(trunk, batch_dim=0)
    engine.backward(heads[0](model(parts[rank])).squeeze(1).square(), weighting)
    losses = single(alone(torch.cat(parts))).squeeze(1).square()
    Engine(alone, batch_dim=0).backward(losses, weighting)
    assert_close([*gradients(trunk), *gradients(heads[0])], [*gradients(alone), *gradients(single)])
    wrapped = [DistributedDataParallel(copy.deepcopy(head)) for head in heads]
    for head in (heads[rank], wrapped[rank]):
        losses = head(model(parts[rank])).squeeze(1).square()
        refused(ParameterError, "same parameters", engine.backward, losses, weighting)
    everything = partial(autogram.backward, batch_dim=0)
    refused(ParameterError, "same on all", everything, losses, weighting)
    refused(ParameterError, "same", gramian_backward, losses, weighting)


def test_heads_outside_of_the_engine_are_averaged_if_they_are_the_same(two: Run) -> None:
    two(_heads)


def _cancelling() -> None:
    """Samples on different processes whose rows are almost the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 8))
    x = torch.randn(6, 8)
    x[4] = x[0] * (1 + 1e-3)

    def losses(samples: Tensor) -> Tensor:
        return (model(samples) * torch.linspace(-1, 2, 8)).sin().sum(1)

    seen: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian.double())
        return torch.ones(len(gramian))

    own = losses(x[3 * dist.get_rank() :][:3])
    Engine(model, batch_dim=0).backward(own, weighting, group=dist.group.WORLD)
    parameters = list(model.parameters())
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            for loss in (losses(x)[i] for i in range(6))
        ]
    ).double()
    expected, got = (torch.linalg.eigvalsh(g)[:1] for g in (rows @ rows.T, seen[0]))
    assert_close([got], [expected], 2e-2)


def test_rows_that_nearly_cancel(two: Run) -> None:
    two(_cancelling)
