"""Losses without samples, in one batched pass or one after the other, against plain rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jdcore import autogram, autojac
from jdcore.graph import Graph, Objectives, Walk, _hooks, _memory, _tasks
from jdcore.graph._tasks import starts_of
from tests.core.autogram.oracle import explicit_jacobian, generalized, randn, relative_error
from tests.memory import peak_bytes
from tests.zoo.test_operations import operations

ALWAYS = 1 << 24
"""A budget: all losses at once, as on accelerators."""
PIECES = 3000
"""A budget for some of the losses at once."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    _tasks._PASSED.clear()
    _tasks._FAILED.clear()
    yield
    torch.set_default_dtype(torch.float32)
    _tasks._PASSED.clear()
    _tasks._FAILED.clear()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many losses each batched pass had."""
    seen: list[int] = []
    original = _tasks.batched_gradients

    def noting(
        outputs: Sequence[Any], inputs: Sequence[Any], cotangents: Sequence[Tensor], retain: bool
    ) -> list[Tensor | None]:
        seen.append(len(cotangents[0]))
        return original(outputs, inputs, cotangents, retain)

    monkeypatch.setattr(_tasks, "batched_gradients", noting)
    return seen


def _check(
    make: Callable[[], tuple[Tensor | list[Tensor], Sequence[Tensor]]], budget: int | None = ALWAYS
) -> None:
    """Gramian and weighted gradient of losses with respect to leaves."""
    losses, leaves = make()
    flat = losses if isinstance(losses, Tensor) else torch.cat([x.reshape(-1) for x in losses])
    jacobian = explicit_jacobian(flat, leaves)
    seen: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.linspace(-1, 2, len(gramian))

    losses, leaves = make()
    autogram.backward(losses, weighting, inputs=leaves, batch_dim=None, memory_budget=budget)
    [gramian] = seen
    assert relative_error(gramian, jacobian @ jacobian.T) <= 1e-12
    update = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in leaves]
    )
    assert relative_error(update, torch.linspace(-1, 2, len(jacobian)) @ jacobian) <= 1e-12


class _Net(nn.Module):
    def __init__(self, heads: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(heads))

    def trunk(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).relu()


def _heads(net: _Net, hidden: Tensor) -> list[Tensor]:
    return [(head(hidden)[:, 0] - k).square().mean() for k, head in enumerate(net.heads)]


def _separate() -> tuple[list[Tensor], list[Tensor]]:
    net = _Net()
    return _heads(net, net.trunk(randn(7, 4))), list(net.parameters())


def _in_a_row() -> tuple[Tensor, list[Tensor]]:
    losses, leaves = _separate()
    return torch.stack(losses), leaves


def _in_rows_of_rows() -> tuple[Tensor, list[Tensor]]:
    losses, leaves = _separate()
    return torch.cat([torch.stack(losses[:2]), torch.stack(losses[2:])]), leaves


def _one_vector() -> tuple[Tensor, list[Tensor]]:
    net = _Net()
    return net.trunk(randn(7, 4)).square().mean(0), list(net.parameters())


def _norms() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)
    )
    return net.eval()(randn(3, 2, 6, 6)).square().mean((0, 2, 3)), list(net.parameters())


def _samples_mix() -> tuple[Tensor, list[Tensor]]:
    net = _Net()
    hidden = nn.functional.batch_norm(net.trunk(randn(7, 4)), None, None, training=True)
    return (hidden @ hidden.T).softmax(0).square().sum(1)[:4], list(net.parameters())


def _some_reach_little() -> tuple[list[Tensor], list[Tensor]]:
    net = _Net()
    hidden = net.trunk(randn(7, 4))
    own, unused = nn.Parameter(randn(3)), nn.Parameter(randn(2))
    losses = [*_heads(net, hidden), own.square().sum(), net.heads[0].weight.sin().sum()]
    return [*losses, torch.zeros(())], [*net.parameters(), own, unused]


def _a_row_below_heads() -> tuple[list[Tensor], list[Tensor]]:
    net = _Net()
    row = net.trunk(randn(7, 4)).mean(0)
    return [*(head(row).square().sum() for head in net.heads[:2]), row], list(net.parameters())


def _one_is_absent() -> tuple[list[Tensor], list[Tensor]]:
    losses, leaves = _separate()
    return [*losses[:2], torch.ones(2), *losses[2:]], leaves


def _deep_and_shallow() -> tuple[list[Tensor], list[Tensor]]:
    """Some losses enter the trunk at several depths, and one is a part of it."""
    net = _Net()
    low = net.first(randn(7, 4)).tanh()
    high = net.second(low).relu()
    losses = [(high * low).mean(), low.square().mean(), *_heads(net, high), high[0, 0]]
    return [*losses, (net.third(high) + high + low).sin().sum()], list(net.parameters())


def _tied() -> tuple[list[Tensor], list[Tensor]]:
    """A head is the weight of a layer of the trunk."""
    net = _Net()
    hidden = net.trunk(randn(7, 4))
    losses = [*_heads(net, hidden), (hidden @ net.second.weight).sin().mean()]
    return losses, list(net.parameters())


def _recurrent() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4)
    state = torch.zeros(5, 4)
    for x in randn(6, 5, 3):
        state = cell(x, state)
    return state.square().mean(0), list(cell.parameters())


def _parts_of_one_result() -> tuple[list[Tensor], list[Tensor]]:
    net = _Net()
    left, right = net.trunk(randn(7, 4)).chunk(2, 1)
    return [left.sin().sum(), right.cos().sum(), (left * right).sum()], list(net.parameters())


def _infinite_elsewhere() -> tuple[list[Tensor], list[Tensor]]:
    """The derivative of one head is infinite, which is no matter to the others."""
    net = _Net()
    hidden = net.trunk(randn(7, 4))
    return [*_heads(net, hidden), (hidden * 0).sqrt()[0, 0] * hidden.sum()][:-1], list(
        net.parameters()
    )


def _retained() -> tuple[list[Tensor], list[Tensor]]:
    """Not leaves, one of which is the result of a matrix product."""
    net = _Net()
    product = net.first(randn(7, 4))
    hidden = product.tanh()
    for tensor in (product, hidden):
        tensor.retain_grad()
    return _heads(net, net.second(hidden)), [product, hidden, net.second.weight]


class _Root(torch.autograd.Function):
    """A square root that is found by iteration, whose backward differentiates a step of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            [found] = torch.autograd.grad(at.sqrt(), at, grad)
        return found


def _heads_of_all_kinds() -> tuple[list[Tensor], list[Tensor]]:
    """One enters the trunk by several ways, one differentiates inside its own backward, and one has
    a sparse gradient."""
    net = _Net()
    hidden = net.trunk(randn(7, 4)) + 1.0
    table = nn.Embedding(9, 6, sparse=True)
    losses = [
        (net.heads[0](hidden) + net.heads[1](hidden * hidden) * hidden.sum()).square().mean(),
        net.heads[2](_Root.apply(hidden)).sum(),  # type: ignore[no-untyped-call]
        (table(torch.tensor([3, 1, 3])) @ net.heads[3].weight.T).mean() * hidden.mean(),
        net.heads[4](hidden.square() * randn(3, 1, 1)).square().mean(),
        (hidden * randn(3, 7, 1)).tanh().sum(),  # broadcast on its way out of the trunk
    ]
    return losses, [*net.parameters(), *table.parameters()]


def _taken_apart() -> tuple[list[Tensor], list[Tensor]]:
    net, vector = _Net(), randn(3).requires_grad_()
    first, *middle, last = net.trunk(randn(7, 4)).square().mean(0)
    # Of a vector that is a parameter, of rows, and where one or all are asked for themselves.
    rows = [row.square().sum() for row in net.third(randn(2, 6))]
    whole = net.heads[0](randn(4, 6)).square()[:, 0]
    for tensor in (first, whole):
        tensor.retain_grad()
    return [last, *middle, first, *rows, *vector, *whole, *_heads(net, randn(3, 6))], [
        *(*net.parameters(), vector, first, whole)
    ]


MODELS = {
    function.__name__.removeprefix("_"): function
    for function in (
        *(_separate, _in_a_row, _in_rows_of_rows, _one_vector, _norms, _samples_mix),
        *(_some_reach_little, _deep_and_shallow, _tied, _recurrent, _parts_of_one_result),
        *(_infinite_elsewhere, _retained, _heads_of_all_kinds),
        *(_a_row_below_heads, _one_is_absent, _taken_apart),
    )
}


@pytest.mark.parametrize("budget", [None, PIECES, ALWAYS])
@pytest.mark.parametrize("name", MODELS)
def test_gramian_and_gradient_are_those_of_plain_rows(name: str, budget: int | None) -> None:
    _check(MODELS[name], budget)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("in_a_row", [5]), ("one_vector", [6]), ("samples_mix", [4]), ("recurrent", [4])),
        *(("norms", [4]), ("parts_of_one_result", [3]), ("some_reach_little", [])),
        *(("a_row_below_heads", [8]), ("one_is_absent", [5])),
    ],
)
def test_what_all_losses_pass_through_is_passed_once(
    name: str, expected: list[int], passes: list[int]
) -> None:
    _check(MODELS[name])
    assert passes == expected


def test_a_budget_bounds_the_losses_of_a_pass(passes: list[int]) -> None:
    _check(MODELS["one_vector"], 4 * 7 * 6 * 8)
    assert passes == [3, 3]


@pytest.mark.parametrize("kind", ["cdist", "custom", "hook", "checkpoint"])
def test_what_cannot_be_batched_is_passed_one_by_one(kind: str, passes: list[int]) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * float(grad.sum() * 0 + 1) * grad

    def make() -> tuple[Tensor, list[Tensor]]:
        net = _Net()
        if kind == "hook":
            net.first.weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        if kind == "checkpoint":
            hidden = torch.utils.checkpoint.checkpoint(net.trunk, randn(7, 4), use_reentrant=False)
        else:
            hidden = net.trunk(randn(7, 4))
        if kind == "custom":
            hidden = Double.apply(hidden)
        if kind == "cdist":
            hidden = torch.cdist(hidden, hidden + hidden.detach().flip(0))
        return hidden.square().mean(0)[:4], list(net.parameters())

    _check(make)
    assert passes == []


def test_losses_go_one_by_one_where_the_batched_pass_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[int] = []

    def fail(*arguments: Any) -> None:
        tries.append(1)
        raise RuntimeError("Batching rule not implemented for aten::fancy.")

    monkeypatch.setattr(_tasks, "batched_gradients", fail)
    _check(MODELS["in_a_row"])
    _check(MODELS["in_a_row"])
    assert tries == [1]


def test_an_error_that_no_batch_is_to_blame_for_is_told_and_forgotten(passes: list[int]) -> None:
    for modified in (True, False):
        net = _Net()
        hidden = net.first(randn(7, 4)).exp()
        losses = net.second(hidden + 1).square().mean(0)
        if modified:
            with torch.no_grad():
                hidden.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                autogram.gramian(losses, batch_dim=None, memory_budget=ALWAYS)
        else:
            autogram.gramian(losses, batch_dim=None, memory_budget=ALWAYS)
    assert passes == [6, 6]


def test_no_batched_gradient_stays_with_a_tensor_that_retains_its_own() -> None:
    for _ in range(2):
        net = _Net()
        hidden = net.first(randn(7, 4)).tanh()
        hidden.retain_grad()
        losses = net.second(hidden).square().mean(0)
        autogram.gramian(losses, batch_dim=None, memory_budget=ALWAYS)
        assert hidden.grad is None or not torch._C._functorch.is_batchedtensor(hidden.grad)


@pytest.mark.parametrize(
    "loss",
    [
        lambda weight: weight.view(-1),
        lambda weight: weight.T,
        lambda weight: weight.unbind()[1],
        lambda weight: torch.stack([weight[0, 0], weight.squeeze()[1, 1]]),
        lambda weight: weight,
    ],
    ids=["view", "transpose", "part", "entries", "all of it"],
)
def test_a_loss_may_be_a_part_of_a_parameter_that_is_used_elsewhere(
    loss: Callable[[Tensor], Tensor],
) -> None:
    def make() -> tuple[list[Tensor], Sequence[Tensor]]:
        weight = randn(30, 20).requires_grad_()
        return [F.linear(randn(2, 20), weight).square().mean(), loss(weight)], [weight]

    for budget in (None, ALWAYS):
        _check(make, budget)


def test_losses_that_a_loop_put_into_a_row_start_where_they_were_computed() -> None:
    weight = randn(3).requires_grad_()
    losses = (weight * weight).sum()[None]
    for k in range(1200):  # more than Python may call within one another
        losses = torch.cat([losses, weight[k % 3][None]])
    starts = starts_of(Graph(Walk([losses]), [weight]), Objectives([losses], None))
    assert len(set(starts.places)) == 1201
    assert starts.entries == [0] * 1201


def test_the_graph_is_freed_if_it_may_be() -> None:
    for _ in range(2):  # once operations of this kind have passed
        x = randn(3).requires_grad_()
        losses = [x.sin().sum(), x.exp().sum()]
        row = x.cos()
        for given in (losses, row):
            autogram.backward(given, lambda g: g.diagonal(), batch_dim=None, memory_budget=ALWAYS)
    for given in (losses, row):
        with pytest.raises(RuntimeError, match="second time"):
            autogram.backward(given, lambda g: g.diagonal(), batch_dim=None, memory_budget=ALWAYS)


def _operations_with(losses: int, join: Callable[[_Net, Tensor], Any]) -> int:
    net = _Net(losses)
    output = join(net, net.trunk(randn(7, 4)))
    engine = autogram.Engine(net.first, net.second, batch_dim=None, memory_budget=ALWAYS)
    return operations(lambda: engine.compute_gramian(output))


def _peaks(module: nn.Module, losses: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes of a step without samples, and of a backward pass of the sum of the losses."""

    def step() -> None:
        autogram.backward(losses(), lambda gramian: torch.ones(len(gramian)), batch_dim=None)

    def plain() -> None:
        losses().sum().backward()

    def peak(run: Callable[[], None]) -> int:
        run()
        module.zero_grad()
        found = peak_bytes(run)
        module.zero_grad()
        return found

    return peak(step), peak(plain)


def test_rows_of_single_passes_are_in_memory_once() -> None:
    net, x = nn.Sequential(*[nn.Conv1d(300, 300, 1) for _ in range(6)]), randn(2, 300, 10)

    def losses() -> Tensor:
        return net(x)[:, :4].tanh().square().mean((0, 2))

    rows = 4 * sum(parameter.numel() * parameter.itemsize for parameter in net.parameters())
    step, plain = _peaks(net, losses)
    assert step - plain <= 1.1 * rows


def test_operations_of_a_vector_of_losses_do_not_grow_with_their_number() -> None:
    def vector(net: _Net, hidden: Tensor) -> Tensor:
        return (hidden @ torch.ones(6, len(net.heads))).square().mean(0)

    assert _operations_with(16, vector) == _operations_with(24, vector)


def test_each_further_head_costs_its_own_operations_and_no_more() -> None:
    def stacked(net: _Net, hidden: Tensor) -> Tensor:
        return torch.stack(_heads(net, hidden))

    few, more, many = (_operations_with(k, stacked) for k in (16, 20, 28))
    assert many - more == 2 * (more - few)
    assert more - few <= 4 * 9  # the seed, and the five operations of a head


def test_losses_that_were_taken_out_of_a_vector_start_there() -> None:
    def apart(net: _Net, hidden: Tensor) -> Tensor:
        return torch.stack([*(hidden @ torch.ones(6, len(net.heads))).square().mean(0)])

    assert _operations_with(16, apart) == _operations_with(24, apart)


@pytest.mark.parametrize("budget", [None, ALWAYS])
def test_costs_of_heads_grow_with_their_number_and_not_with_its_square(
    budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    differentiate = _tasks.differentiate

    def noting(outputs: Any, inputs: Sequence[Any], *rest: Any) -> Any:
        nonlocal asked
        asked += len(inputs)
        return differentiate(outputs, inputs, *rest)

    monkeypatch.setattr(_tasks, "differentiate", noting)

    def step(heads: int) -> tuple[int, int]:
        """Gradients that passes are asked for, and functions called."""
        nonlocal asked
        net = _Net(heads)
        engine = autogram.Engine(net, batch_dim=None, memory_budget=budget)
        calls = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        def run() -> None:
            nonlocal asked, calls
            losses = torch.stack(_heads(net, net.trunk(randn(7, 4))))
            asked = calls = 0
            sys.setprofile(profile)
            try:
                engine.backward(losses, lambda gramian: gramian.diagonal())
            finally:
                sys.setprofile(None)

        run()
        run()
        return asked, calls

    few, more, many = map(step, (20, 40, 80))
    assert many[0] - more[0] == 2 * (more[0] - few[0])
    assert many[1] - more[1] <= 2.1 * (more[1] - few[1])


def test_a_parameter_of_one_head_has_one_row_in_memory() -> None:
    heads, x = nn.ModuleList(nn.Conv1d(300, 300, 1) for _ in range(6)), randn(2, 300, 3)

    def losses() -> Tensor:
        return torch.stack([head(x).square().mean() for head in heads])

    step, plain = _peaks(heads, losses)
    # The rows, of which the gradients are multiples.
    assert step <= 2.1 * plain


def test_rows_of_heads_that_are_not_kept_are_in_memory_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_memory, "_ROWS", 1)  # a pass for each parameter
    heads, x = nn.ModuleList(nn.Conv1d(300, 300, 1, bias=False) for _ in range(6)), randn(2, 300, 3)
    engine = autogram.Engine(heads.float(), batch_dim=None)
    losses = torch.stack([head(x.float()).square().mean() for head in heads])
    gramian = engine.compute_gramian(losses)
    for k, head in enumerate(heads):
        [row] = torch.autograd.grad(losses[k], [*head.parameters()], retain_graph=True)
        assert relative_error(gramian[k, k], row.double().square().sum()) <= 1e-6
    # In float64, a row twice as large would lie beside it.
    peak = peak_bytes(lambda: engine.compute_gramian(losses))
    assert peak <= 2.5 * 4 * 300 * 300


@pytest.mark.parametrize("layers", [1, 2])
def test_operations_of_tasks_with_samples_do_not_grow_with_their_number(layers: int) -> None:
    def step(tasks: int) -> int:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)), nn.Linear(6, tasks))
        engine = autogram.Engine(net, batch_dim=0, memory_budget=ALWAYS)
        x = randn(5, 6)
        losses = net(x).square()
        return operations(lambda: engine.compute_gramian(losses))

    assert step(3) == step(12)


@pytest.mark.parametrize("budget", [None, ALWAYS])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_tasks_with_samples_some_of_which_do_not_reach_all(
    budget: int | None, batch_dim: int
) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 1) for _ in "ab")
            self.alone = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).tanh()
            columns = [*(head(hidden) for head in self.heads), self.alone(x), hidden[:, :1]]
            return torch.cat(columns, 1).square()

    torch.manual_seed(0)
    net, x = Several(), randn(5, 3)
    parameters = list(net.parameters())
    losses = net(x).movedim(0, batch_dim).contiguous()
    jacobian = explicit_jacobian(losses, parameters)
    weights = torch.linspace(-1, 2, losses.numel()).view(losses.shape)
    engine = autogram.Engine(net, batch_dim=batch_dim, memory_budget=budget)
    for _ in range(2):
        losses = net(x).movedim(0, batch_dim).contiguous()
        gramian = engine.compute_gramian(losses)
        expected = generalized(jacobian @ jacobian.T, losses.shape)
        assert relative_error(gramian, expected) <= 1e-12
        engine.backward(losses, lambda _: weights)
        update = torch.cat([p.grad.reshape(-1) for p in parameters])
        assert relative_error(update, weights.reshape(-1) @ jacobian) <= 1e-12
        net.zero_grad()


def test_hooks_that_autojac_made_and_removed_are_nobody_elses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(graph: object) -> bool:
        raise AssertionError("looked for hooks of others, which takes tens of milliseconds")

    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))  # rows that are worth a hook
    engine = autogram.Engine(net, batch_dim=None)
    engine.compute_gramian(net(torch.randn(3, 300)).mean(0))
    losses = net(torch.randn(3, 300)).mean(0)
    monkeypatch.setattr(_hooks, "hooks_anywhere", look)
    autojac.backward(losses, inputs=list(net.parameters()), retain_graph=True)
    engine.compute_gramian(losses)
