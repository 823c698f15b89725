"""
What a step costs in calls, which is what accelerators wait for.

Counts are the same on every machine. Tensors on the meta device stand for those of an accelerator:
they are no CPU tensors, and whatever reads a value of theirs, which would make the host wait for
the device, fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import _differentiable
from jdcore.aggregation import GramianAggregator
from jdcore.autojac import (
    _problem,
    _vmap,
    backward,
    gramian_backward,
    jac,
    jac_to_grad,
    mtl_backward,
    zero_jac,
)
from jdcore.autojac._problem import Problem
from jdcore.autojac._vmap import Kind, choose_chunk_size
from jdcore.autojac.transform import Diagonalize, Init
from jdcore.graph import Reach, Walk, reach
from jdcore.graph._hooks import hooks_made_lately
from jdcore.graph._walk import largest_gradient
from tests.operations import Operations

M = 4


def _python_calls(step: Callable[[], Any]) -> int:
    """Calls of functions of this library."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        inside = frame.f_globals.get("__name__", "").startswith("jdcore.")
        count += event == "call" and inside

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def _net(layers: int, device: str = "cpu", width: int = 8) -> nn.Sequential:
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts).to(device)


def _images(device: str) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()
    ).to(device)
    return model, torch.empty(5, 3, 8, 8, device=device)


def _losses(y: Tensor, m: int = M) -> list[Tensor]:
    return [(y - k).square().mean() for k in range(m)]


def _to_solve(losses: list[Tensor], model: nn.Module) -> Problem:
    start = (Init(losses) >> Diagonalize(losses))()
    return Problem.of(losses, list(model.parameters()), [start[loss] for loss in losses])


def _passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of each backward pass from now on."""
    made: list[str] = []

    def count(name: str) -> None:
        plain = getattr(_problem, name)
        monkeypatch.setattr(_problem, name, lambda *given: made.append(name) or plain(*given))

    count("differentiate")
    count("batched_gradients")
    return made


@pytest.fixture
def _fresh() -> None:
    _vmap._WORKED.clear()
    _vmap._FAILED.clear()


@pytest.fixture
def _meta_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors, which hold nothing to be differentiated, and which torch does not autocast."""
    monkeypatch.setattr(_differentiable, "check_one", lambda *_: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


# -- accelerators ----------------------------------------------------------------------------------


def _chosen(model: nn.Module, x: Tensor, m: int, free: int | None) -> int:
    losses = _losses(model(x), m)
    graph, inputs = reach(losses), list(model.parameters())

    def use_all() -> bool:
        raise AssertionError("reads values, for which the host would wait")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_vmap, "free_memory", lambda device, enough: free)
        return choose_chunk_size(Kind.of(graph), inputs, m, use_all, graph)


@pytest.mark.usefixtures("_fresh")
def test_on_accelerators_all_rows_go_at_once_convolutions_and_separate_losses_too() -> None:
    model, x = _images("meta")
    assert _chosen(model, x, 8, free=1 << 30) == 8
    assert _chosen(model, x, 300, free=1 << 34) == 300
    assert _chosen(_net(2, "meta"), torch.empty(4, 8, device="meta"), 8, free=1 << 30) == 8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_gradients_that_are_nested_have_no_one_size(layout: torch.layout) -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    pieces = torch.nested.nested_tensor([torch.ones(n, 2) for n in (3, 1)], layout=layout)
    losses = [piece.sum() for piece in nn.functional.linear(pieces, weight).unbind()]
    assert largest_gradient(reach(losses)) == 3 * 3 * 4  # of the first piece


@pytest.mark.usefixtures("_fresh")
def test_on_accelerators_memory_bounds_the_rows_at_once() -> None:
    model, x = _images("meta")
    largest = 5 * 8 * 6 * 6 * 4  # bytes of the gradient at the first convolution
    graph = reach(_losses(model(x)))
    assert largest_gradient(graph) == largest
    jacobian = 16 * 4 * sum(parameter.numel() for parameter in model.parameters())
    row = _vmap.bytes_of_row(list(model.parameters()), graph)
    assert _chosen(model, x, 16, free=jacobian + 5 * row) == 5
    assert _chosen(model, x, 16, free=0) == 1
    assert _chosen(model, x, 100, free=None) == 64  # a device that does not tell


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("m", [2, 8])
def test_on_accelerators_the_host_never_waits_and_no_call_is_made_for_each_row(m: int) -> None:
    model, x = _images("meta")
    counts = []
    for rows in (m, 2 * m):
        # One output, so that no row passes through the loss of another.
        y = model(x).mean(dim=0)[:rows]
        start = (Init([y]) >> Diagonalize([y]))()
        with Operations() as operations:
            jacobians = Problem.of([y], list(model.parameters()), [start[y]]).jacobians(True)
        assert [len(jacobian) for jacobian in jacobians] == [rows] * 6
        counts.append(operations.counts.total())
    assert counts[0] == counts[1]


def test_on_accelerators_single_rows_are_written_by_one_call_each() -> None:
    def counted(layers: int, m: int) -> tuple[Counter[str], int]:
        model = _net(layers, "meta")
        y = model(torch.empty(3, 8, device="meta")).mean(dim=0)[:m]
        start = (Init([y]) >> Diagonalize([y]))()
        problem = Problem.of([y], list(model.parameters()), [start[y]])
        with pytest.MonkeyPatch.context() as patch:
            # Which rows are zero is asked once, before the first pass.
            patch.setattr(Problem, "usage", property(lambda self: [[0]] * m))
            with Operations() as operations:
                problem.row_by_row(retain_graph=True)
            return operations.counts, _python_calls(lambda: problem.row_by_row(retain_graph=True))

    counts, calls = counted(6, 8)
    assert counts["_foreach_copy_"] == 8
    assert counts["copy_"] == 0
    # No hooks: the number of parameters does not enter.
    per_row = (calls - counted(6, 4)[1]) / 4
    assert per_row == (counted(12, 8)[1] - counted(12, 4)[1]) / 4
    assert per_row <= 12


@pytest.mark.usefixtures("_fresh", "_meta_accepted")
def test_on_accelerators_two_rows_take_the_kernels_of_two_passes_and_the_host_never_waits() -> None:
    model, x = _images("meta")
    parameters = list(model.parameters())
    views = {"view", "t", "select", "unbind", "detach", "empty", "ones", "stack", "diag_embed"}

    def counted(step: Callable[[list[Tensor]], Any]) -> Counter[str]:
        losses = _losses(model(x), 2)
        with Operations() as operations:
            step(losses)
        return operations.counts

    def passes(losses: list[Tensor]) -> None:
        for loss in losses:
            torch.autograd.grad(loss, parameters, retain_graph=True)

    plain, ours = counted(passes), counted(backward)
    assert ours["_foreach_copy_"] == 2
    more = {name: count - plain[name] for name, count in ours.items() if name not in views}
    assert {name for name, count in more.items() if count > 0} == {"_foreach_copy_"}


@pytest.mark.usefixtures("_fresh", "_meta_accepted")
@pytest.mark.parametrize("m", [2, 8])
def test_on_accelerators_heads_take_a_pass_each_and_the_host_never_waits(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = _net(2, "meta")
    heads = [nn.Linear(8, 1, device="meta") for _ in range(m)]
    passes = _passes(monkeypatch)
    features = body(torch.empty(5, 8, device="meta"))
    mtl_backward([head(features).mean() for head in heads], features)
    assert len(passes) == (4 if m == 2 else m + 1)  # two rows take fewer calls one by one
    assert body[0].weight.jac.shape == (m, 8, 8)


# -- CPUs ------------------------------------------------------------------------------------------


def test_python_calls_per_row_do_not_grow_with_the_number_of_small_parameters() -> None:
    def per_row(layers: int) -> float:
        model = _net(layers)
        x = torch.randn(3, 8)

        def calls(m: int) -> int:
            losses = _losses(model(x), m)
            return _python_calls(lambda: jac(losses, parallel_chunk_size=1))

        return (calls(12) - calls(4)) / 8

    per_row(2)  # the first step of a process looks at what later ones know
    few, many = per_row(2), per_row(20)
    assert many == few
    assert many <= 13


def test_a_row_takes_the_operations_of_its_backward_pass_and_one_copy() -> None:
    model, x = _net(5), torch.randn(3, 8)
    inputs = list(model.parameters())

    def counted(step: Callable[[list[Tensor]], Any], m: int) -> int:
        losses = _losses(model(x), m)
        with Operations() as operations:
            step(losses)
        return operations.counts.total()

    def passes(losses: list[Tensor]) -> None:
        for loss in losses:
            torch.autograd.grad(loss, inputs, retain_graph=True)

    def ours(losses: list[Tensor]) -> None:
        backward(losses, parallel_chunk_size=1)
        for parameter in inputs:
            del parameter.jac

    plain = (counted(passes, 12) - counted(passes, 4)) / 8
    own = (counted(ours, 12) - counted(ours, 4)) / 8
    # One call of _foreach_copy_ for all parameters, and the choice of the cotangent.
    assert own <= plain + 2


@pytest.mark.parametrize(("m", "most"), [(4, 33), (12, 33)])
def test_python_calls_for_each_task_of_mtl_backward(m: int, most: int) -> None:
    trunk, heads = _net(2), nn.ModuleList(nn.Linear(8, 1) for _ in range(2 * m))

    def calls(tasks: int) -> int:
        zero_jac(trunk.parameters())
        heads.zero_grad()
        features = trunk(torch.randn(3, 8))
        losses = [head(features).square().mean() for head in heads[:tasks]]
        return _python_calls(lambda: mtl_backward(losses, features))

    # The first calls get to know the parameters, and some look for what vmap leaves behind.
    few, many = (min(calls(tasks) for _ in range(9)) for tasks in (m, 2 * m))
    assert (many - few) / m <= most


def test_large_weights_are_multiplied_into_their_place() -> None:
    # Of the first layer, torch does not show whether the transpose of its weight has hooks: none
    # has where nobody made any lately.
    hooks_made_lately([])
    model = _net(3, width=300)
    losses = _losses(model(torch.randn(2, 300)), 3)
    with Operations() as operations:
        backward(losses, parallel_chunk_size=1)
    assert operations.counts["copy_"] == 0


@pytest.mark.parametrize(("m", "passes"), [(2, 2), (8, 8), (9, 10)])
def test_a_few_small_tasks_take_one_pass_each_from_end_to_end(
    m: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, x = _net(2), torch.randn(5, 8)
    heads = [nn.Linear(8, 1) for _ in range(m)]

    def step(chunk_size: int | None) -> tuple[list[Tensor], int]:
        with monkeypatch.context() as patch:
            made = _passes(patch)
            features = trunk(x)
            mtl_backward(
                [head(features).square().mean() for head in heads],
                features,
                parallel_chunk_size=chunk_size,
            )
        found = [p.jac for p in trunk.parameters()] + [
            p.grad for h in heads for p in h.parameters()
        ]
        for parameter in trunk.parameters():
            del parameter.jac
        for head in heads:
            head.zero_grad()
        return found, len(made)

    step(None)  # of a kind that was batched before, it is known that it works
    got, count = step(None)
    expected, most = step(1)
    assert count == passes
    assert most == 2 * m
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_walk_over_the_graph_is_taken_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from jdcore.graph import _walk

    walks = []
    found = _walk.Reach  # of which each walk makes one
    monkeypatch.setattr(_walk, "Reach", lambda *given: walks.append(0) or found(*given))
    model = _net(2)
    backward(_losses(model(torch.randn(3, 8))))
    assert len(walks) == 1


def test_gramian_backward_goes_over_each_edge_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _net(2)

    def asked(step: Callable[[list[Tensor]], Any]) -> int:
        count = 0

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "c_call" and argument.__name__ == "name"

        losses = _losses(model(torch.randn(3, 8)))
        sys.setprofile(profile)
        try:
            step(losses)
        finally:
            sys.setprofile(None)
        return count

    nodes = asked(lambda losses: Walk(losses))
    assert nodes == 4 * 3 + 2 * 3 + 4
    gramian_backward(_losses(model(torch.randn(3, 8))), torch.diag)  # makes the plan
    assert asked(lambda losses: gramian_backward(losses, torch.diag)) == nodes


@pytest.mark.parametrize("m", [2, 8])
def test_mtl_backward_walks_over_each_operation_once(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jdcore.autojac import _mtl_plan

    nodes = []

    def counted(*given: Any, **options: Any) -> Reach:
        found = reach(*given, **options)
        nodes.extend(found.nodes)
        return found

    monkeypatch.setattr(_mtl_plan, "reach", counted)
    features = _net(2)(torch.randn(3, 8))
    losses = [nn.Linear(8, 1)(features).square().mean() for _ in range(m)]
    graph = reach(losses)
    mtl_backward(losses, features)
    assert Counter(nodes) == Counter([*graph.nodes])


def test_nothing_is_added_up_where_heads_end() -> None:
    def additions(m: int) -> int:
        features = _net(2)(torch.randn(3, 8))
        losses = [nn.Linear(8, 1)(features).square().mean() for _ in range(m)]
        with Operations() as operations:
            mtl_backward(losses, features, parallel_chunk_size=1)
        return operations.counts["add"] + operations.counts["add_"]

    assert additions(16) == additions(8) == 0


def test_each_of_many_parameters_costs_jac_to_grad_a_few_calls() -> None:
    def calls(layers: int) -> tuple[int, int]:
        model = _net(layers)
        backward(_losses(model(torch.randn(3, 8))))
        aggregator = GramianAggregator(lambda gramian: gramian.diagonal())
        with Operations() as operations:
            jac_to_grad(model.parameters(), aggregator, retain_jac=True)
        model.zero_grad()
        python = _python_calls(lambda: jac_to_grad(model.parameters(), aggregator))
        return python, operations.counts.total()

    calls(2)
    (few_calls, few), (many_calls, many) = calls(2), calls(22)
    # A weight and a bias for each layer: views as a matrix and back, and writing into the buffer.
    assert (many - few) / 40 <= 4
    assert (many_calls - few_calls) / 40 <= 15


# -- losses out of a loop --------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_entries_of_a_vector_cost_what_the_vector_costs(given: bool) -> None:
    model = _net(2).double()
    x, parameters = torch.randn(9, 8, dtype=torch.float64), list(model.parameters())
    inputs = parameters if given else None

    def counted(take: Callable[[Tensor], Any]) -> tuple[Counter[str], list[Tensor]]:
        losses = take(model(x).square().mean(dim=1))
        with Operations() as run:
            found = jac(losses, inputs)
        return run.counts, list(found)

    (vector, expected), (entries, found) = counted(lambda v: v), counted(list)
    assert entries == vector
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0.0, atol=0.0)


def _hear(losses: list[Tensor], vector: Tensor) -> None:
    losses[1].register_hook(lambda gradient: None if gradient is None else 3.0 * gradient)


def _hear_operation(losses: list[Tensor], vector: Tensor) -> None:
    losses[0].grad_fn.register_hook(lambda gradients, _: (3.0 * gradients[0],))


def _swap(losses: list[Tensor], vector: Tensor) -> None:
    losses[0], losses[1] = losses[1], losses[0]


def _cut_off(losses: list[Tensor], vector: Tensor) -> None:
    vector.detach_()


def _begin_anew(losses: list[Tensor], vector: Tensor) -> None:
    vector.detach_().requires_grad_()


@pytest.mark.parametrize(
    "change", [_hear, _hear_operation, _swap, _cut_off, _begin_anew, lambda *_: None]
)
def test_entries_of_a_vector_have_the_rows_that_they_have_one_by_one(
    change: Callable[[list[Tensor], Tensor], None],
) -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def losses() -> list[Tensor]:
        vector = w.exp() * w.sum()
        entries = list(vector)
        change(entries, vector)
        return entries

    entries = losses()
    expected = [torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in entries]
    backward(losses())
    torch.testing.assert_close(w.jac, torch.stack(expected))


def test_an_entry_that_is_an_input_and_one_that_retains_its_gradient_are_met() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    entries = list(w.exp())
    [rows] = jac(entries, entries[0])
    assert rows.tolist() == [1.0, 0.0]
    entries = list(w.exp())
    entries[0].retain_grad()
    backward(entries, inputs=[w, entries[0]])
    assert entries[0].jac.tolist() == [1.0, 0.0]
