"""What the library chooses, and what happens where vmap does not work."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from jdcore.autojac import _problem, _vmap, backward, gramian_backward, jac, zero_jac
from jdcore.errors import VectorizationError, VectorizationWarning
from jdcore.graph import _operations, reach
from tests.core.autojac.conftest import Truth


@pytest.fixture(autouse=True)
def _fresh_memory() -> Iterator[None]:
    _vmap._WORKED.clear()
    _vmap._FAILED.clear()
    yield
    _vmap._WORKED.clear()
    _vmap._FAILED.clear()


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _chosen(outputs: list[Tensor], inputs: list[Tensor], m: int, *, dense: bool = True) -> int:
    graph = reach(outputs)
    return _vmap.choose_chunk_size(_vmap.Kind.of(graph), inputs, m, lambda: dense, graph)


def test_small_graphs_are_vmapped_on_cpu_in_bounded_chunks() -> None:
    layer = nn.Linear(8, 8)
    out = layer(torch.randn(8)).tanh()
    assert _chosen([out], list(layer.parameters()), 8) == 8
    assert _chosen([out], list(layer.parameters()), 1000) == 64
    assert _chosen([out], list(layer.parameters()), 3) == 3
    assert _chosen([out], list(layer.parameters()), 2) == 1


@pytest.mark.parametrize("step", [backward, lambda y: gramian_backward(y, torch.diag)])
def test_warnings_that_were_shown_once_are_not_shown_again_after_a_step(
    step: Callable[[Tensor], Any],
) -> None:
    layer = nn.Linear(8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(4):
            warnings.warn("of the loop around", stacklevel=1)
            step(layer(torch.randn(8)).tanh())
            zero_jac(layer.parameters())
    assert len(caught) == 1


def test_large_layers_are_differentiated_row_by_row_on_cpu() -> None:
    layer = nn.Linear(512, 512)
    assert _chosen([layer(torch.randn(512))], list(layer.parameters()), 8) == 1


def test_separate_losses_are_differentiated_row_by_row_on_cpu() -> None:
    a = _leaf(2)
    losses = [a.sum(), a.prod()]
    assert _chosen(losses, [a], 4, dense=False) == 1


def test_convolutions_are_differentiated_row_by_row_on_cpu() -> None:
    layer = nn.Conv2d(1, 2, 3)
    out = layer(torch.randn(1, 1, 5, 5))
    assert _chosen([out], list(layer.parameters()), 8) == 1


def test_leaves_with_hooks_are_differentiated_row_by_row() -> None:
    a = _leaf(2)
    seen = []
    a.register_hook(seen.append)
    backward(a.sin())
    assert [gradient.shape for gradient in seen] == [(2,), (2,)]
    assert a.jac.shape == (2, 2)


class _Item(torch.autograd.Function):
    """A custom function whose backward pass cannot be vmapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert gradient.sum().item() > -1e300
        return gradient * 2


def test_custom_functions_just_work(truth: Truth) -> None:
    a = _leaf(3)
    losses = _Item.apply(a).sin()
    [expected] = truth([losses], [a])
    backward(losses)
    torch.testing.assert_close(a.jac, expected)


def test_rows_of_what_is_not_known_to_be_batched_rightly_are_compared_with_a_single_pass(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_operations, "_WRONG", frozenset())  # as in a torch of which nobody knows
    a = _leaf(6)
    losses = torch.cdist(a.view(2, 3), torch.arange(6.0, dtype=a.dtype).view(2, 3)).flatten()
    [expected] = truth([losses], [a])
    with pytest.raises(VectorizationError, match="wrongly"):
        backward(losses, parallel_chunk_size=4, retain_graph=True)
    with pytest.warns(VectorizationWarning, match="wrongly"):
        backward(losses)
    torch.testing.assert_close(a.jac, expected)


@pytest.mark.parametrize("single", [[1], 1], ids=["one entry", "a number"])
def test_an_operation_batched_rightly_is_not_trusted_with_numbers_or_single_entries(
    truth: Truth, single: Any
) -> None:
    # torch batches `index_copy` wrongly, or not at all, where the index is a number.
    def losses(index: Any, entries: Any) -> Tensor:
        source = a.take(torch.tensor(entries))
        return torch.zeros(3, dtype=a.dtype).index_copy(0, torch.tensor(index), source)

    a = _leaf(3)
    backward(losses([0, 2], [0, 1]), inputs=[a])
    a.jac = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VectorizationWarning)
        backward(losses(1, single), inputs=[a])
    [expected] = truth([losses(1, single)], [a])
    torch.testing.assert_close(a.jac, expected)


def test_parameters_that_wrap_others_are_differentiated_row_by_row(truth: Truth) -> None:
    layers = [nn.Linear(2, 3) for _ in "12"]
    inner = layers[1].weight.detach()
    layers[1].weight = nn.Parameter(TwoTensor(inner, inner.clone()))
    for layer in layers:  # vmap works for the first one
        losses = layer(torch.ones(4, 2)).square().sum(1)
        backward(losses, inputs=layer.parameters())
        expected = truth([layer(torch.ones(4, 2)).square().sum(1)], [layer.bias])
        torch.testing.assert_close(layer.bias.jac, *expected)


def test_an_explicit_chunk_size_is_obeyed_and_its_failure_explained() -> None:
    a = _leaf(3)
    with pytest.raises(VectorizationError, match=r"parallel_chunk_size at None") as caught:
        backward(_Item.apply(a).sin(), parallel_chunk_size=2)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not hasattr(a, "jac")


class _NoBatches(torch.autograd.Function):
    """Raises where its gradient is batched, in words that do not tell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(grads[0]):
            raise RuntimeError("The expanded size must match.")
        return grads[0]


def test_a_failure_that_does_not_name_vmap_is_explained_where_single_rows_work() -> None:
    a = _leaf(3)
    losses = _NoBatches.apply(a).sin()
    with pytest.raises(VectorizationError, match=r"size must match.*set it to 1"):
        backward(losses, parallel_chunk_size=2)
    assert not hasattr(a, "jac")
    backward(losses, parallel_chunk_size=1)
    assert a.jac.shape == (3, 3)


def _broken_on_first_sight(a: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("Batching rule not implemented for aten::fancy. Sorry.")

    monkeypatch.setattr("jdcore.autojac._problem.batched_gradients", fail)
    return a.sin()


def test_where_vmap_fails_rows_are_computed_one_by_one_with_one_warning_for_each_kind_of_graph(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = _leaf(3)
    losses = _broken_on_first_sight(a, monkeypatch)
    [expected] = truth([losses], [a])
    with pytest.warns(VectorizationWarning, match="aten::fancy"):
        backward(losses)
    torch.testing.assert_close(a.jac, expected)
    backward(a.sin())  # no second warning: it would be an error here
    with pytest.warns(VectorizationWarning):
        backward(a.cos())


def test_the_graph_is_freed_after_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    a = _leaf(3)
    losses = _broken_on_first_sight(a, monkeypatch)
    with pytest.warns(VectorizationWarning):
        backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        backward(losses)


def test_an_error_that_vmap_is_not_to_blame_for_stays_that_of_torch() -> None:
    for chunk_size in (None, 1, 2):
        a = _leaf(3)
        hidden = a.exp()
        losses = hidden.sin()
        hidden.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            backward(losses, parallel_chunk_size=chunk_size)
        assert type(caught.value) is RuntimeError
        assert not hasattr(a, "jac")


def test_errors_of_hooks_that_were_made_by_exec_stay_theirs() -> None:
    made: dict[str, Any] = {}
    exec("def hook(grad):\n    raise ValueError('mine')", made)  # its module has no name
    x = _leaf(3)
    y = x.tanh()
    y.register_hook(made["hook"])
    with pytest.raises(ValueError, match="mine"):
        jac(y, x, parallel_chunk_size=3)


def test_where_the_memory_of_the_host_ends_vmap_is_not_blamed() -> None:
    x = _leaf(3)
    jac(x.tanh().expand(4, 3)[0], x, parallel_chunk_size=3)
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        jac(x.tanh().expand(1 << 50, 3)[0], x, parallel_chunk_size=3)
    assert type(caught.value) is RuntimeError


def test_an_intermediate_tensor_that_retains_grad_gets_no_batched_gradient(truth: Truth) -> None:
    a = _leaf(3)
    hidden = a.sin()
    hidden.retain_grad()
    losses = hidden.square()
    [expected] = truth([losses], [a])
    hidden.grad = None
    backward(a.sin().square())  # that vmap serves such a graph does not mean that it serves any
    a.jac = None
    backward(losses)
    torch.testing.assert_close(a.jac, expected)
    torch.testing.assert_close(hidden.grad, 2 * hidden.detach())  # the sum of the rows


def test_an_explicit_chunk_size_with_a_tensor_that_retains_grad_is_refused() -> None:
    a = _leaf(3)
    hidden = a.sin()
    hidden.retain_grad()
    with pytest.raises(VectorizationError, match="retain_grad"):
        backward(hidden.square(), parallel_chunk_size=3)
    assert hidden.grad is None
    assert not hasattr(a, "jac")


_WRONGLY_BATCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "distances": lambda a: torch.cdist(a, a[:2].sin()).sum(1),
    "strided scatter": lambda a: torch.as_strided_scatter(a, a[0].sin(), (3,), (1,)).square(),
    "roll of a number": lambda a: a.sum().square().roll(1) * a.sin(),
}


@pytest.mark.parametrize("name", _WRONGLY_BATCHED)
def test_operations_that_torch_batches_wrongly_are_differentiated_row_by_row(
    truth: Truth, name: str
) -> None:
    a = _leaf(4, 3)
    [expected] = truth([_WRONGLY_BATCHED[name](a)], [a])
    for chunk_size in (None, 1):
        [found] = jac(_WRONGLY_BATCHED[name](a), a, parallel_chunk_size=chunk_size)
        torch.testing.assert_close(found, expected)
    with pytest.raises(VectorizationError, match="wrongly"):
        jac(_WRONGLY_BATCHED[name](a), a, parallel_chunk_size=4)


@pytest.mark.parametrize("before", [0, 3])
def test_a_hook_that_keeps_gradients_hears_single_rows(truth: Truth, before: int) -> None:
    a = _leaf(3)
    [expected] = truth([a.sin().square()], [a])
    kept: list[Tensor] = []
    for _ in range(before):
        a.jac = None
        backward(a.sin().square())
    for _ in range(2):
        kept.clear()
        a.jac = None
        hidden = a.sin()
        hidden.register_hook(kept.append)
        backward(hidden.square())
        torch.testing.assert_close(a.jac, expected)
        torch.testing.assert_close(torch.stack(kept), torch.diag(2 * hidden.detach()))


def test_what_an_earlier_pass_left_behind_is_not_blamed_on_later_ones(truth: Truth) -> None:
    """Whoever keeps an error, as an interactive session does, keeps the gradients of its pass."""
    a, kept = _leaf(3), list[Tensor]()
    [expected] = truth([a.sin().square()], [a])

    def stop(gradient: Tensor) -> None:
        raise ValueError("not now")

    for hook, error in ((stop, ValueError), (kept.append, VectorizationError)):
        hidden = a.sin()
        hidden.register_hook(hook)
        with pytest.raises(error) as caught:
            jac(hidden.square(), a, parallel_chunk_size=3)
        for chunk_size in (3, None):
            _vmap._WORKED.clear()
            assert torch.equal(
                jac(a.sin().square(), a, parallel_chunk_size=chunk_size)[0], expected
            )
        del caught


def test_a_known_kind_of_graph_that_fails_once_is_told_and_goes_one_by_one_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = _leaf(3)
    backward(a.sin())
    _broken_on_first_sight(a, monkeypatch)
    with pytest.raises(VectorizationError, match="differentiated one by one"):
        backward(a.sin())
    backward(a.sin())
    assert a.jac.shape == (3, 3)


def test_a_known_kind_of_graph_that_fails_goes_one_by_one_at_once_while_it_is_there(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("The expanded size of the tensor must match")  # as for some shapes only

    a = _leaf(3)
    backward(a.sin())
    a.jac = None
    monkeypatch.setattr("jdcore.autojac._problem.batched_gradients", fail)
    losses = a.sin()
    with pytest.warns(VectorizationWarning, match="expanded size"):
        backward(losses, retain_graph=True)
    [expected] = truth([losses], [a])
    torch.testing.assert_close(a.jac, expected)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_grad_of_inputs_and_outputs_that_retain_it_does_not_change(
    chunk_size: int | None,
) -> None:
    a = _leaf(2)
    hidden = a.sin()
    losses = hidden.exp()
    hidden.retain_grad()
    losses.retain_grad()
    hidden.grad = kept = torch.zeros(2, dtype=torch.float64)
    backward(losses, inputs=[hidden], parallel_chunk_size=chunk_size)
    assert hidden.grad is kept
    assert hidden.grad.eq(0).all()
    assert losses.grad is None


def test_sparse_gradients_become_dense_rows(truth: Truth) -> None:
    embedding = nn.Embedding(5, 2, sparse=True).double()
    losses = embedding(torch.tensor([1, 3])).sum(dim=1)
    dense = nn.Embedding.from_pretrained(embedding.weight.detach().clone(), freeze=False)
    [expected] = truth([dense(torch.tensor([1, 3])).sum(dim=1)], [dense.weight])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VectorizationWarning)
        [result] = jac(losses, embedding.weight)
    assert result.layout == torch.strided
    torch.testing.assert_close(result, expected)


def test_recurrent_layers_work(truth: Truth) -> None:
    lstm = nn.LSTM(3, 4, batch_first=True).double()
    losses = lstm(torch.randn(2, 5, 3, dtype=torch.float64))[0].square().mean(dim=(0, 1))
    expected = truth([losses], list(lstm.parameters()))
    backward(losses)
    for parameter, jacobian in zip(lstm.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.jac, jacobian)


@pytest.mark.parametrize("cls", [VectorizationError, VectorizationWarning])
def test_what_vmap_says_crosses_process_borders(cls: type[Exception]) -> None:
    error = cls("aten::fancy: no rule.")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.reason) == (str(error), error.reason)


def test_no_batched_tensor_is_left_anywhere() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    losses = model(torch.randn(3, dtype=torch.float64))
    backward(losses)
    _vmap._check_nothing_escaped()
    for parameter in model.parameters():
        assert parameter.jac.is_contiguous()
        assert parameter.jac.data_ptr() != 0


def test_sparse_gradients_of_operations_that_were_batched_before_are_dense_rows() -> None:
    tokens = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    tables = [nn.Embedding(11, 6, sparse=sparse) for sparse in (False, True)]
    for table in tables:
        table.weight.data = torch.linspace(-1.0, 1.0, 66).view(11, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VectorizationWarning)
            backward(table(tokens).tanh().square().flatten(1).sum(1))
    dense, sparse = (table.weight.jac for table in tables)
    torch.testing.assert_close(dense, sparse)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_sparse_factors_of_products_that_were_batched_before_are_told_once(
    truth: Truth, chunk_size: int | None
) -> None:
    weight, x = _leaf(3, 2), torch.eye(4, 3, dtype=torch.float64)
    backward((x @ weight).square().sum(1), parallel_chunk_size=chunk_size)
    del weight.jac
    losses = (x.to_sparse() @ weight).square().sum(1)
    expected = truth([losses], [weight])
    with pytest.raises(VectorizationError, match="Sparse"):
        backward(losses, parallel_chunk_size=chunk_size)
    assert not hasattr(weight, "jac")
    if chunk_size is None:
        backward((x.to_sparse() @ weight).square().sum(1))
        torch.testing.assert_close([weight.jac], expected)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_numbers_of_a_checkpoint_are_those_of_the_forward_pass_in_all_rows(
    truth: Truth, chunk_size: int | None
) -> None:
    weight, x = _leaf(3, 4), torch.ones(5, 3, dtype=torch.float64)

    def dropped(inner: Tensor) -> Tensor:
        return torch.dropout(x @ inner, 0.5, train=True)

    losses = checkpoint(dropped, weight, use_reentrant=False).square().sum(1)
    expected = truth([losses], [weight])
    torch.testing.assert_close(jac(losses, [weight], parallel_chunk_size=chunk_size), expected)


@pytest.mark.parametrize("most", [3, 1])
def test_less_rows_are_taken_at_once_where_memory_ends(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched, sizes = _problem.batched_gradients, list[int]()

    def short(outputs: Any, inputs: Any, rows: Any, retain_graph: bool) -> Any:
        sizes.append(len(rows[0]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("out of memory")
        return batched(outputs, inputs, rows, retain_graph)

    monkeypatch.setattr(_problem, "batched_gradients", short)
    layer, x = nn.Linear(8, 8).double(), torch.randn(8, dtype=torch.float64)
    for _ in range(2):
        out = layer(x).tanh()
        [rows] = jac([out], [layer.weight], retain_graph=True)
        expected = [torch.autograd.grad(y, layer.weight, retain_graph=True)[0] for y in out]
        torch.testing.assert_close(rows, torch.stack(expected))
    assert sizes[:4] == ([8, 4, 2, 2] if most == 3 else [8, 4, 2, 8])
    # A pass that frees the graph cannot be made once more.
    with pytest.raises(torch.OutOfMemoryError):
        jac([out], [layer.weight])
    assert not _vmap._FAILED


def test_views_that_torch_allows_no_more_disturb_nobody() -> None:
    """Somewhere in the process, entries of a vector that was written into live on."""
    other = _leaf(2) * 1.0
    entries = list(other)
    with torch.no_grad():
        other.mul_(2.0)
    layer = nn.Linear(8, 8).double()
    out = layer(torch.randn(8, dtype=torch.float64)).tanh()
    [rows, _] = jac(out, layer.parameters())
    assert rows.shape == (8, 8, 8)
    with pytest.raises(RuntimeError, match="modified inplace"):
        print(entries[0].is_leaf)
