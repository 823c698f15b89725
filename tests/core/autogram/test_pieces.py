"""Batches so large that Gramians are put together from pieces of one half of them."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from jdcore.autogram import Engine
from jdcore.graph._memory import CAPACITY, Memory, blocks
from jdcore.graph.shares import Accumulator, Geometry, Patches, SingleRows, _outer, _patches
from tests.core.autogram.oracle import check_engine, randn


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 40))
def test_blocks_cover_an_array_once_and_are_no_larger_than_allowed(
    shape: list[int], largest: int
) -> None:
    covered = torch.zeros(shape, dtype=torch.int64)
    for block in blocks(shape, largest):
        assert covered[block].numel() <= largest
        covered[block] += 1
    assert (covered == 1).all()


def test_blocks_are_runs_as_long_as_possible() -> None:
    whole = slice(0, 8)
    assert list(blocks((3, 8), 24)) == [(slice(0, 3), whole)]
    assert list(blocks((3, 8), 9)) == [(slice(i, i + 1), whole) for i in range(3)]
    assert list(blocks((1, 8), 4)) == [(slice(0, 1), slice(a, a + 4)) for a in (0, 4)]


def test_kept_rows_of_a_convolution_let_go_of_what_they_were_made_of() -> None:
    layer, images = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 9, 9)
    geometry = Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    grads = torch.randn(1, 4, 3, 7, 7)
    gone = [ref(images), ref(grads)]
    expected = Patches(layer.weight, geometry, images, grads, 4).rows()
    share = Patches(layer.weight, geometry, images, grads, 4)
    cpu = torch.device("cpu")
    gramian = Accumulator(4, cpu, True, Memory.of(cpu, None))
    gramian.add_share(share)
    del images, grads
    assert [reference() for reference in gone] == [None, None]
    assert torch.equal(share.rows(), expected)
    weights = torch.randn(1, 4)
    summed = (weights[0] @ expected.reshape(4, -1)).view(layer.weight.shape)
    torch.testing.assert_close(share.weighted(weights), summed)


def _accumulator_of(rows: int) -> Accumulator:
    cpu = torch.device("cpu")
    return Accumulator(rows, cpu, False, Memory.of(cpu, None))


@pytest.mark.parametrize("rows", [1, 127, 129, 300])
def test_rows_of_any_number_give_their_gramian(rows: int) -> None:
    jacobian = randn(rows, 40).double()
    gramian = _accumulator_of(rows)
    gramian.add_rows(jacobian)
    gramian.add_rows(2 * jacobian)
    torch.testing.assert_close(
        gramian.result()[0], 5 * jacobian @ jacobian.T, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(gramian.result()[0], gramian.result()[0].T)


def test_many_rows_of_one_loss_take_no_room_for_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, losses = [randn(3) for _ in range(60)], [*range(50), *[7] * 10]
    stacked, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: (stacked.append(len(parts)), stack(parts))[1])
    gramian = _accumulator_of(51)
    SingleRows(rows, losses).add_gramian(gramian)
    assert sum(stacked) == 60
    expected = torch.zeros(51, dtype=torch.float64)
    for row, loss in zip(rows, losses, strict=True):
        expected[loss] += row.square().sum()
    torch.testing.assert_close(gramian.result()[0], expected.diag())


def test_what_lies_above_the_diagonal_does_not_count() -> None:
    gramian = _accumulator_of(2)
    gramian.add(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    gramian.add(torch.tensor([[1.0]]), 0)
    gramian.add(torch.tensor([[1.0, 1.0]]), 1)
    assert gramian.result()[0].tolist() == [[2.0, 3.0], [3.0, 4.0]]


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_batch_of_vectors(bias: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))

    check_engine(make, lambda model: model(randn(140, 6)).pow(2).sum(1), 0)


def test_a_large_batch_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outer, "outer_ghost_beats_direct", lambda *_: True)
    check_engine(lambda: nn.Linear(3, 4), lambda m: m(randn(7, 130, 3)).pow(2).sum((1, 2)), 0)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2)},
        {"kernel_size": (3, 2), "stride": 2, "dilation": (2, 3), "padding": (3, 1)},
        {"kernel_size": (1, 4), "padding": (2, 0)},
    ],
)
def test_a_large_batch_of_images(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], images: int
) -> None:
    monkeypatch.setattr(_patches, "conv_ghost_beats_direct", lambda *_: True)

    def losses(model: nn.Module) -> Tensor:
        return model(randn(9 * images, 2, 11, 12)).pow(2).reshape(9, -1).sum(1)

    check_engine(lambda: nn.Conv2d(2, 3, **options), losses, 0)


def test_a_large_batch_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jdcore.graph._memory.CAPACITY", 1)
    tokens = torch.randint(0, 4, (6, 70), generator=torch.Generator().manual_seed(3))
    check_engine(lambda: nn.Embedding(4, 3), lambda model: model(tokens).pow(2).sum((1, 2)), 0)


@pytest.mark.parametrize("batch_dim", [0, 1, 2, -2])
def test_samples_in_any_dimension_of_the_losses(batch_dim: int) -> None:
    def losses(model: nn.Module) -> Tensor:
        return model(randn(5, 6)).pow(2).view(5, 2, 3).movedim(0, batch_dim)

    check_engine(lambda: nn.Linear(6, 6), losses, batch_dim)


def test_rows_that_are_read_at_once_stay_in_the_second_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    add_rows = Accumulator.add_rows

    def noting(gramian: Accumulator, rows: Tensor) -> None:
        sizes.append(rows.numel())
        add_rows(gramian, rows)

    monkeypatch.setattr(Accumulator, "add_rows", noting)
    layer = nn.Linear(300, 96, bias=False)
    losses = layer(torch.randn(16, 32, 300)).square().sum((1, 2))
    Engine(layer, batch_dim=0).compute_gramian(losses)
    assert sum(sizes) == 16 * 300 * 96
    assert max(sizes) <= CAPACITY // 4


def test_gramians_are_exactly_symmetric() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    gramian = Engine(model, batch_dim=0).compute_gramian(model(randn(150, 3, 4, 4)).sum(1))
    assert len(_accumulator_of(150).halves()) > 1
    assert torch.equal(gramian, gramian.T)
