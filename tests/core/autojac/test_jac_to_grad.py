from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jdcore import ParameterError, ParameterTypeError
from jdcore._fields import get_jac
from jdcore.aggregation import GramianAggregator, as_module
from jdcore.autojac import backward, gramian_backward, jac, jac_to_grad, zero_jac
from tests.core.methods import EqualWeighting


def _by_norm(gramian: Tensor) -> Tensor:
    return gramian.diagonal().rsqrt()


def _mean(matrix: Tensor) -> Tensor:
    return matrix.mean(dim=0)


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    backward(model(torch.randn(5, 4, dtype=torch.float64)).square().mean(dim=0))
    return model


def _matrix(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.jac.flatten(1) for tensor in tensors], dim=1)


def _grads(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.grad.flatten() for tensor in tensors])


def test_a_gramian_method_aggregates_all_tensors_as_one_matrix_and_returns_its_weights() -> None:
    parameters = list(_model().parameters())
    matrix = _matrix(parameters)
    expected = _by_norm(matrix @ matrix.T)
    weights = jac_to_grad(iter(parameters), GramianAggregator(_by_norm))
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(_grads(parameters), expected @ matrix)
    assert not any(hasattr(parameter, "jac") for parameter in parameters)


def test_a_gramian_method_never_sees_the_concatenation(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.randn(n)) for n in (3, 70_000, 5, 80_000)]
    for parameter in parameters:
        parameter.jac = torch.randn(2, *parameter.shape)
    joined: list[int] = []

    def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
        joined.append(sum(tensor.numel() for tensor in tensors))
        return torch.concat(tensors, dim)

    monkeypatch.setattr(torch, "cat", cat)
    jac_to_grad(parameters, GramianAggregator(_by_norm))
    assert joined == [16]  # of the small blocks, which are summed together


def test_a_function_is_an_aggregator_without_weights() -> None:
    parameters = list(_model().parameters())
    matrix = _matrix(parameters)
    assert jac_to_grad(parameters, _mean) is None
    torch.testing.assert_close(_grads(parameters), matrix.mean(dim=0))


def test_gradients_share_no_memory() -> None:
    parameters = list(_model().parameters())
    jac_to_grad(parameters, _mean)
    storages = {parameter.grad.untyped_storage().data_ptr() for parameter in parameters}
    assert len(storages) == len(parameters)


def test_jac_is_kept_on_demand_and_grad_accumulates() -> None:
    parameters = list(_model().parameters())
    matrix = _matrix(parameters)
    jac_to_grad(parameters, _mean, retain_jac=True)
    jac_to_grad(parameters, _mean)
    torch.testing.assert_close(_grads(parameters), 2 * matrix.mean(dim=0))


def test_groups_are_aggregated_apart() -> None:
    model = _model()
    groups = [list(layer.parameters()) for layer in (model[0], model[2])]
    matrices = [_matrix(group) for group in groups]
    for group in groups:
        jac_to_grad(group, GramianAggregator(_by_norm))
    for group, matrix in zip(groups, matrices, strict=True):
        torch.testing.assert_close(_grads(group), _by_norm(matrix @ matrix.T) @ matrix)


def test_tensors_without_jac_are_skipped() -> None:
    model = _model()
    other = nn.Linear(2, 2)
    jac_to_grad([*other.parameters(), *model.parameters()], _mean)
    assert other.weight.grad is None
    assert model[0].weight.grad is not None


def test_a_repeated_tensor_counts_once() -> None:
    a = torch.ones(2, requires_grad=True)
    backward(a * 2)
    jac_to_grad([a, a], lambda matrix: matrix.sum(dim=0))
    assert a.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("aggregator", [_mean, GramianAggregator(_by_norm)])
def test_mixed_dtypes_give_each_tensor_a_gradient_of_its_own_dtype(aggregator: Any) -> None:
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    b = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True)
    backward([a.sum() * b.sum() * c.float().sum(), (a**2).sum() + b.sum() + c.sum()])
    matrix = torch.cat([t.jac.double() for t in (a, b, c)], dim=1)
    jac_to_grad([a, b, c], aggregator)
    for tensor, expected in zip((a, b, c), aggregator(matrix).split([2, 1, 1]), strict=True):
        assert tensor.grad.dtype == tensor.dtype
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=1e-2, atol=0.0)


def test_the_gradient_has_the_memory_layout_of_its_tensor() -> None:
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    backward(weight.square().sum(dim=(1, 2, 3)))
    assert weight.jac.is_contiguous()
    jac_to_grad(weight, _mean)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight.grad, weight.detach())


class _FirstRow:
    """A block-wise aggregator that returns views, in whatever dtype it likes."""

    dtype = torch.float32

    def __call__(self, matrix: Tensor) -> Tensor:
        return matrix[0]

    def aggregate_blocks(self, blocks: list[Tensor]) -> tuple[list[Tensor], None]:
        return [block[0].to(self.dtype) for block in blocks], None


def test_views_returned_by_an_aggregator_are_copied() -> None:
    a = torch.ones(2, requires_grad=True)
    backward(a * 2)
    assert jac_to_grad(a, _FirstRow(), retain_jac=True) is None
    a.grad.add_(5.0)
    assert a.jac.tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_one_vector_for_several_tensors_becomes_gradients_apart() -> None:
    class Same(_FirstRow):
        def aggregate_blocks(self, blocks: list[Tensor]) -> tuple[list[Tensor], None]:
            vector = blocks[0].sum(0)
            return [vector, vector], None

    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    backward(a * b)
    jac_to_grad([a, b], Same())
    a.grad.add_(5.0)
    assert b.grad.tolist() == [1.0, 1.0]


def test_vectors_of_an_aggregator_are_cast_to_the_dtype_of_their_tensor() -> None:
    aggregator = _FirstRow()
    aggregator.dtype = torch.float64
    a = torch.ones(2, requires_grad=True)
    backward(a * 2)
    jac_to_grad(a, aggregator)
    assert a.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda blocks: ([b.sum() for b in blocks], None), r"vectors of shapes \[\(2,\), \(3,\)\]"),
        (lambda blocks: None, r"returns a list of vectors, and weights or None.*a NoneType"),
        (lambda blocks: [b[0] for b in blocks], r"a list of vectors, and weights.*returns a list"),
        (
            lambda blocks: ([b[0] for b in blocks], torch.ones(2)),
            r"weights of shape \[5\], or None",
        ),
        (lambda blocks: ([b[0] for b in blocks], [0.2] * 5), r"weights of shape \[5\].*got a list"),
    ],
)
def test_an_aggregator_that_returns_something_else_changes_nothing(
    answer: Callable[[list[Tensor]], Any], message: str
) -> None:
    class Wrong(_FirstRow):
        def aggregate_blocks(self, blocks: list[Tensor]) -> Any:
            return answer(blocks)

    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    backward(torch.cat([a, b]))
    with pytest.raises(ParameterError, match=message):
        jac_to_grad([a, b], Wrong())
    assert a.grad is None
    assert a.jac.shape == (5, 2)


_NO_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a complex128 Tensor": lambda vector: vector * 1j,
    "a sparse_coo float64 Tensor": Tensor.to_sparse,
    "on the meta device": lambda vector: vector.to("meta"),
    "a nested float64 Tensor": lambda vector: torch.nested.as_nested_tensor([vector]),
}


@pytest.mark.parametrize("kind", _NO_NUMBERS)
@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_vectors_that_are_no_dense_real_numbers_are_refused_and_nothing_changes(
    kind: str, blockwise: bool
) -> None:
    class Blockwise(_FirstRow):
        def aggregate_blocks(self, blocks: list[Tensor]) -> tuple[list[Tensor], None]:
            return [_NO_NUMBERS[kind](block[0]) for block in blocks], None

    a = torch.ones(2, dtype=torch.float64, requires_grad=True)
    backward(a * 2)
    aggregator = Blockwise() if blockwise else lambda jacobian: _NO_NUMBERS[kind](jacobian[0])
    with pytest.raises(ParameterError, match=kind):
        jac_to_grad(a, aggregator)
    assert a.grad is None
    assert a.jac.shape == (2, 2)


@pytest.mark.parametrize("kind", _NO_NUMBERS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_weights_that_are_no_dense_real_numbers_are_refused_and_nothing_changes(kind: str) -> None:
    def weighting(gramian: Tensor) -> Tensor:
        return _NO_NUMBERS[kind](gramian[0])

    a = torch.ones(2, dtype=torch.float64, requires_grad=True)
    backward(a * 2)
    with pytest.raises(ParameterError, match=kind):
        jac_to_grad(a, GramianAggregator(weighting))
    with pytest.raises(ParameterError, match=kind):
        gramian_backward(a * 2, weighting)
    assert a.grad is None
    assert a.jac.shape == (2, 2)


def _two_losses(weight: Tensor, data: Tensor) -> Tensor:
    products = data @ weight
    return torch.stack([products.sum(), (products**2).sum()])


def test_losses_and_a_second_batch_reach_an_aggregator_that_takes_them() -> None:
    seen: dict[str, Any] = {}

    def aggregator(jacobian: Tensor, losses: Tensor, second: Tensor) -> Tensor:
        seen.update(losses=losses, second=second)
        return jacobian.sum(dim=0)

    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    bias = torch.tensor([3.0], requires_grad=True)
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    losses, others = _two_losses(weight, one) + bias, _two_losses(weight, two) + bias
    backward(losses)

    jac_to_grad([weight, bias], aggregator, losses=losses, second=jac(others, [weight, bias]))

    assert torch.equal(seen["losses"], torch.tensor([4.0, 4.0]))
    assert not seen["losses"].requires_grad
    assert torch.equal(seen["second"], torch.tensor([[0.0, 1.0, 1.0], [0.0, 4.0, 1.0]]))


def test_an_aggregator_that_takes_neither_does_without() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    data = torch.tensor([[1.0, 0.0]])
    losses = _two_losses(weight, data)
    backward(losses, retain_graph=True)

    jac_to_grad(weight, lambda jacobian: jacobian[0], losses=losses, second=jac(losses, weight))

    assert torch.equal(weight.grad, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"losses": torch.ones(3)}, "`losses` must be 2 values, one for each objective"),
        ({"second": torch.ones(3, 2)}, r"`second` must be of shape \[2, 2\], as .jac"),
        ({"second": [torch.ones(2, 2)] * 2}, "`second` must be 1 Jacobians, one for each tensor"),
    ],
)
def test_losses_and_second_batches_that_do_not_fit_are_refused_and_nothing_changes(
    given: dict[str, Any], message: str
) -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    backward(_two_losses(weight, torch.tensor([[1.0, 0.0]])))

    with pytest.raises(ParameterError, match=message):
        jac_to_grad(weight, lambda jacobian: jacobian[0], **given)
    assert weight.grad is None
    assert get_jac(weight) is not None


@pytest.mark.parametrize("wrap", [lambda weighting: weighting, as_module])
def test_a_weighting_is_refused_with_the_way_to_its_aggregator_though_a_square_jacobian_fits_it(
    wrap: Any,
) -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    backward([2 * w[0] + w[1], w[0] + 2 * w[1]])
    with pytest.raises(ParameterTypeError, match=r"GramianAggregator\(.*EqualWeighting\("):
        jac_to_grad([w], wrap(EqualWeighting()))
    assert w.grad is None
    jac_to_grad([w], GramianAggregator(wrap(EqualWeighting())))
    assert w.grad.tolist() == [1.5, 1.5]


def test_zero_jac_forgets_the_rows_of_a_step_that_was_not_finished() -> None:
    w, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    backward([w.sum(), w[0] * 3])
    zero_jac([w, other])
    backward([w.sum(), w[0] * 3])
    assert w.jac.tolist() == [[1.0, 1.0], [3.0, 0.0]]
    with pytest.raises(ParameterTypeError, match="`tensors`"):
        zero_jac(nn.Linear(2, 1))
