"""
What is read of operations under torch's private names, for each operation with a closed form.

A name that a version of torch does not show costs the closed form, and only that: this table is to
tell which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from jdcore._handles import hooks_made
from jdcore.graph import RULES
from jdcore.graph import _saved as reader
from jdcore.graph._saved import Unreadable, saved, saved_as_it_is

W = torch.arange(12.0).view(4, 3).sin().requires_grad_()
X = torch.arange(6.0).view(2, 3).cos().requires_grad_()
V = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
IMAGES = torch.arange(36.0).view(1, 4, 3, 3).sin().requires_grad_()
KERNEL = torch.arange(16.0).view(4, 2, 2, 1).cos().requires_grad_()
GAIN = torch.linspace(0.5, 2.0, 4).requires_grad_()
TABLE = torch.arange(10.0).view(5, 2).requires_grad_()
INDEX = torch.tensor([0, 3, 3, 1])
STATES = torch.tensor([0.5, 1.0, 1.5, 2.0])


@frozen
class Row:
    """
    A row of the table.

    :param make: Makes the result of the operation.
    :param shows: What is read, by name: a tensor or a plain value.
    :param exists: What is read whose value does not matter, as the kernel chooses it.
    """

    make: Callable[[], Tensor]
    shows: Mapping[str, Any] = {}
    exists: tuple[str, ...] = ()


def _lstm() -> Tensor:
    torch.manual_seed(0)
    layer = torch.nn.LSTM(3, 2)
    found: Tensor = layer(torch.ones(4, 2, 3))[0]
    return found


LSTM = {"mode": 2, "has_biases": True, "reverse": False, "input": torch.ones(4, 2, 3)}
LSTM_TENSORS = ("weight0", "weight1", "weight2", "weight3", "hx_", "cx_", "result0")
CONVOLUTION = {
    "input": IMAGES,
    "weight": KERNEL,
    "stride": (2, 1),
    "padding": (1, 0),
    "dilation": (1, 2),
    "transposed": False,
    "output_padding": (0, 0),
    "groups": 2,
}
NO_PADDING = (1 << 64) - 1
BAGS = torch.tensor([0, 2])

TABLE_OF_OPERATIONS: dict[str, Row] = {
    "MmBackward0": Row(lambda: X @ W.T, {"self": X, "mat2": W.T}),
    "AddmmBackward0": Row(
        lambda: torch.addmm(GAIN, X, W.T, alpha=2, beta=3),
        {"mat1": X, "mat2": W.T, "alpha": 2, "beta": 3},
    ),
    "BmmBackward0": Row(
        lambda: torch.bmm(X[None], W.T[None]), {"self": X[None], "mat2": W.T[None]}
    ),
    "BaddbmmBackward0": Row(
        lambda: torch.baddbmm(GAIN, X[None], W.T[None], beta=2, alpha=3),
        {"batch1": X[None], "batch2": W.T[None], "beta": 2, "alpha": 3},
    ),
    "MvBackward0": Row(lambda: X @ V, {"self": X}),
    "ConvolutionBackward0": Row(
        lambda: F.conv2d(IMAGES, KERNEL, None, (2, 1), (1, 0), (1, 2), 2), CONVOLUTION
    ),
    "NativeLayerNormBackward0": Row(
        lambda: F.layer_norm(X, (3,), V, V),
        {"input": X, "normalized_shape": (3,), "result1": X.mean(1, keepdim=True)},
        exists=("result2",),
    ),
    "NativeGroupNormBackward0": Row(
        lambda: F.group_norm(IMAGES, 2, GAIN, GAIN),
        {"input": IMAGES, "N": 1, "C": 4, "HxW": 9, "group": 2},
        exists=("result1", "result2"),
    ),
    "NativeBatchNormBackward0": Row(
        lambda: F.batch_norm(IMAGES, STATES, STATES, GAIN, GAIN, eps=0.5),
        {
            "input": IMAGES,
            "training": False,
            "running_mean": STATES,
            "running_var": STATES,
            "eps": 0.5,
        },
    ),
    "EmbeddingBackward0": Row(
        lambda: F.embedding(INDEX, TABLE, padding_idx=3),
        {"indices": INDEX, "padding_idx": 3, "scale_grad_by_freq": False, "sparse": False},
    ),
    "EmbeddingBagBackward0": Row(
        lambda: F.embedding_bag(INDEX, TABLE, BAGS, mode="mean", padding_idx=1),
        {
            "indices": INDEX,
            "offsets": BAGS,
            "mode": 1,
            "padding_idx": 1,
            "scale_grad_by_freq": False,
            "sparse": False,
            "per_sample_weights": None,
            "result1": torch.tensor([0, 0, 1, 1]),
            "result2": torch.tensor([2, 1]),
        },
    ),
    "IndexSelectBackward0": Row(lambda: TABLE.index_select(0, INDEX), {"index": INDEX, "dim": 0}),
    "AddBackward0": Row(lambda: torch.add(V, V, alpha=3), {"alpha": 3}),
    "SubBackward0": Row(lambda: torch.sub(V, V, alpha=3), {"alpha": 3}),
    "MulBackward0": Row(lambda: V * X, {"self": V, "other": X}),
    "DivBackward0": Row(lambda: V / X, {"self": V, "other": X}),
    "ExpandBackward0": Row(lambda: V.expand(2, 3)),
    "PreluKernelBackward0": Row(lambda: F.prelu(IMAGES, GAIN), {"self": IMAGES}),
    "MkldnnRnnLayerBackward0": Row(_lstm, LSTM, LSTM_TENSORS),
}

# Those of kernels for accelerators, which only those can show.
ELSEWHERE = {"CudnnBatchNormBackward0", "FusedRmsNormBackward0"}


def _node(name: str) -> Any:
    """The first operation of a name behind the result."""
    result = TABLE_OF_OPERATIONS[name].make()
    stack: list[Any] = [result.grad_fn]
    while stack:
        node = stack.pop(0)
        if node.name() == name:
            return node, result
        stack += [child for child, _ in node.next_functions if child is not None]
    raise AssertionError(f"{result.grad_fn} is not computed by {name}")


def test_every_closed_form_is_in_the_table() -> None:
    assert RULES.keys() == TABLE_OF_OPERATIONS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", TABLE_OF_OPERATIONS)
def test_operations_show_what_their_closed_forms_need(name: str) -> None:
    row = TABLE_OF_OPERATIONS[name]
    node, _result = _node(name)
    for attribute, expected in row.shows.items():
        found = saved(node, attribute)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(found, expected)
        else:
            assert found == expected, attribute
    for attribute in row.exists:
        assert isinstance(saved(node, attribute), Tensor), attribute


def test_no_padding_is_told() -> None:
    for node in (F.embedding(INDEX, TABLE).grad_fn, F.embedding_bag(INDEX, TABLE, BAGS).grad_fn):
        assert saved(node, "padding_idx") in (-1, NO_PADDING)


@pytest.mark.parametrize("name", TABLE_OF_OPERATIONS)
def test_shapes_and_dtypes_of_results_are_shown(name: str) -> None:
    node, _result = _node(name)
    results = reader.results_of(node)
    assert all(dtype == torch.float32 for *_sizes, dtype in results[:1])
    if node is _result.grad_fn:
        assert results[_result.output_nr] == (*_result.shape, _result.dtype)


def test_what_is_not_shown_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="does not show 'nothing'"):
        saved((V * X).grad_fn, "nothing")


def test_tensors_of_checkpoints_are_not_read_by_who_would_compute_them_anew() -> None:
    plain = X @ W.T
    assert torch.equal(saved_as_it_is(plain.grad_fn, "self"), X)
    hidden = checkpoint(lambda x: x @ W.T, X, use_reentrant=False)
    with pytest.raises(Unreadable, match="as it is"):
        saved_as_it_is(hidden.grad_fn, "self")


def test_operands_are_the_very_tensors_with_their_hooks() -> None:
    turned = W.T
    assert saved((X @ turned).grad_fn, "mat2") is turned


def test_integers_tell_operations_of_one_name_apart() -> None:
    nodes = [X.roll(1, 0).grad_fn, X.roll(1, 1).grad_fn, X.roll(1, 0).grad_fn]
    same, other, again = reader.plain_attributes(nodes)
    assert same == again != other
    flipped, another = reader.plain_attributes([X.flip(0).grad_fn, X.flip(1).grad_fn])
    assert flipped != another
    # A slope moves nothing, and may change in each step; that of other operations is no number.
    sloped = [torch.nn.functional.leaky_relu(X, slope).grad_fn for slope in (0.5, 0.1)]
    steep, flat, none = reader.plain_attributes([*sloped, X.exp().grad_fn])
    assert steep == flat
    assert none == ()


def test_operations_are_numbered_in_the_order_of_the_forward_pass() -> None:
    before = reader.next_computed_at()
    first = V * 2
    between = reader.next_computed_at()
    second = V * 3
    nodes = [second.grad_fn, first.grad_fn]
    assert not reader.some_computed_before(nodes, before)
    assert reader.some_computed_before(nodes, between)
    assert not reader.some_computed_before(nodes[:1], between)
    assert reader.some_computed_before(nodes[:1], reader.next_computed_at())


def test_hooks_of_all_kinds_are_counted() -> None:
    made = hooks_made()
    hidden = V * 2
    handles: list[RemovableHandle] = [
        hidden.register_hook(lambda _: None),
        hidden.grad_fn.register_hook(lambda *_: None),
        hidden.grad_fn.register_prehook(lambda _: None),
        V.register_post_accumulate_grad_hook(lambda _: None),
    ]
    assert hooks_made() == made + 4
    for handle in handles:
        handle.remove()
    assert hooks_made() == made + 4


def test_passes_are_told_apart() -> None:
    seen: list[int] = []
    for _ in range(2):
        hidden = V * 2
        hidden.register_hook(lambda _: seen.append(reader.current_pass()))
        torch.autograd.grad(hidden.sum(), V)
    assert reader.current_pass() < 0 <= seen[0] != seen[1]


def test_the_function_behind_a_node_is_shown() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    assert reader.function_of(Twice.apply(V).grad_fn) is Twice
    assert reader.function_of((2 * V).grad_fn) is None
    [of_a_list] = torch._foreach_mul([V], [2.0])
    assert type(of_a_list.grad_fn).__name__ == "CppFunction"  # as those of others in C++
    assert reader.function_of(of_a_list.grad_fn) is None
