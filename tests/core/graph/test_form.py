"""What follows from the form of a graph is kept for graphs of this form, and for no others."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from jdcore.autogram import Engine
from jdcore.graph import Graph, Walk, _plan
from jdcore.graph._graph import Form


def _graph(model: nn.Module, samples: int = 3, *, frozen: bool = False) -> Graph:
    losses = model(torch.ones(samples, 4)).square().sum(1)
    parameters = list(model.parameters())
    return Graph(Walk([losses]), parameters[:-1] if frozen else parameters)


def test_graphs_of_all_steps_have_one_form() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    first, second = _graph(model), _graph(model)
    assert first.form is second.form
    assert first.nodes != second.nodes
    assert _graph(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))).form is first.form


def test_shapes_dtypes_operations_and_what_is_wanted_tell_forms_apart() -> None:
    model = nn.Linear(4, 3)
    form = _graph(model).form
    assert _graph(model, 5).form is not form
    assert _graph(model, frozen=True).form is not form
    assert _graph(nn.Linear(4, 2)).form is not form
    assert _graph(nn.Sequential(nn.Linear(4, 3), nn.Tanh())).form is not form
    single = torch.ones(4, requires_grad=True)
    double = single.detach().double().requires_grad_()
    one, two = (Graph(Walk([(x * 2).sum()]), [x]).form for x in (single, double))
    assert one is not two
    assert (one.precision, two.precision) == (torch.float32, torch.float64)


def test_forms_of_ever_new_lengths_are_forgotten_but_for_those_of_plans() -> None:
    model = nn.Linear(4, 3)

    def form_of(samples: int) -> ref[Form]:
        return ref(_graph(model, samples).form)

    kept = Engine(model, batch_dim=0)
    kept.compute_gramian(model(torch.ones(101, 4)).square().sum(1))
    planned, first = form_of(101), form_of(102)
    last = [form_of(3 + i) for i in range(40)][-1]
    gc.collect()
    assert planned() is not None
    assert first() is None
    assert last() is not None


def test_forms_are_forgotten_without_the_collector_of_cycles() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    engine = Engine(model, batch_dim=None, memory_budget=1 << 20)
    gc.collect()
    gc.disable()
    try:
        forms = []
        for samples in range(3, 83):
            losses = model(torch.ones(samples, 4)).square().mean(0)
            forms.append(ref(Graph(Walk([losses]), list(model.parameters())).form))
            engine.compute_gramian(losses)
            del losses
    finally:
        gc.enable()
    assert all(form() is None for form in forms[:20])


def test_what_losses_without_samples_enter_is_found_once_for_each_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    engine, x = Engine(model, batch_dim=None), torch.ones(3, 4)
    expected = engine.compute_gramian(model(x).square().sum(0))
    calls: list[object] = []
    monkeypatch.setattr(_plan, "descend", lambda *given: calls.append(given))
    found = engine.compute_gramian(model(x).square().sum(0))
    assert not calls
    assert torch.equal(found, expected)


def test_a_parameter_whose_data_was_replaced_has_its_new_shape() -> None:
    parameter = nn.Parameter(torch.ones(2))
    kept = parameter * 2  # whose node of the leaf is that of later graphs, too
    parameter.data = torch.ones(5)
    [leaf] = Graph(Walk([(parameter * 2).sum()]), [parameter]).form.leaves
    assert Graph(Walk([(parameter * 2).sum()]), [parameter]).form.results[leaf][0].shape == (5,)
    assert kept.shape == (2,)


@pytest.mark.parametrize("shared", [False, True])
def test_the_order_leads_from_operands_to_results(shared: bool) -> None:
    first = nn.Linear(4, 4)
    second = first if shared else nn.Linear(4, 4)

    def losses(x: Tensor) -> Tensor:
        return second(first(x).tanh()).sum(1)

    graph = Graph(Walk([losses(torch.ones(3, 4))]), list(first.parameters()))
    order, form = graph.form.upwards, graph.form
    assert sorted(order) == list(range(len(graph.nodes)))
    place = {node: i for i, node in enumerate(order)}
    for node, edges in enumerate(form.inputs):
        assert all(place[child] < place[node] for child, _ in edges if child >= 0)
    assert form.wanted == {i for i, leaf in graph.leaves.items() if leaf in {*first.parameters()}}
    assert all(node in form.leading for node in form.wanted)


def test_the_work_of_a_new_graph_grows_like_its_size() -> None:
    def lines(layers: int) -> int:
        """How often a line of plans begins, also by the next turn of a loop."""
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
        losses = model(torch.ones(3, 2)).square().sum(1)
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            count += event == "line"
            return trace if frame.f_code.co_filename == _plan.__file__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            Engine(model, batch_dim=0).backward(losses, lambda gramian: gramian[0])
        finally:
            sys.settrace(before)
        return count

    few, more, most = lines(20), lines(40), lines(60)
    assert most - more <= more - few
