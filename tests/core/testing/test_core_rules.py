"""The closed forms of the core obey the laws that those of third parties have to obey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, randn
from torch.nn import functional as F

from jdcore.graph import RULES
from jdcore.testing import OperationExample, gramian_rule_tests, rule_checks

Tensors = tuple[Any, ...]


def _example(
    call: Callable[..., Tensor],
    inputs: Callable[[int], Tensors],
    operands: Callable[[], Tensors],
    label: str,
) -> OperationExample:
    return OperationExample(call, inputs=inputs, operands=operands, label=label)


def _vectors(n: int) -> tuple[Tensor]:
    return (randn(n, 3),)


def _images(n: int) -> tuple[Tensor]:
    return (randn(n, 4, 5, 6),)


def _tokens(n: int) -> tuple[Tensor]:
    return (torch.randint(5, (n, 3)),)


def _table() -> tuple[Tensor]:
    return (randn(5, 2),)


def _gains() -> tuple[Tensor, Tensor]:
    return randn(4), randn(4)


def _normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    state = torch.linspace(0.5, 2.0, 4, dtype=x.dtype)
    return F.batch_norm(x, state, state, weight, bias)


def _token_for_all(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([x, token.expand(len(x), -1)], 1)


EXAMPLES: dict[str, list[OperationExample]] = {
    "MmBackward0": [
        _example(lambda x, w: x @ w, _vectors, lambda: (randn(3, 4),), "second"),
        _example(lambda x, w: (w @ x.T).T, _vectors, lambda: (randn(4, 3),), "first"),
    ],
    "AddmmBackward0": [
        _example(
            lambda x, b, w: torch.addmm(b, x, w.T, beta=2, alpha=3),
            _vectors,
            lambda: (randn(4), randn(4, 3)),
            "second",
        ),
        _example(
            lambda x, b, w: torch.addmm(b, w, x.T, beta=2, alpha=3).T,
            _vectors,
            lambda: (randn(4, 1), randn(4, 3)),
            "first",
        ),
        _example(
            lambda x, b, w: torch.addmm(b, x, w),
            _vectors,
            lambda: (randn(1), randn(3, 4)),
            "one bias",
        ),
        _example(
            lambda x, b, w: torch.addmm(b, x, w, alpha=2, beta=2),
            _vectors,
            lambda: (randn(1, 4), randn(3, 4)),
            "a row of biases",
        ),
    ],
    "BmmBackward0": [
        _example(
            lambda x, w: torch.bmm(x.expand(2, -1, -1), w).transpose(0, 1),
            _vectors,
            lambda: (randn(2, 3, 4),),
            "second",
        ),
        _example(
            lambda x, w: torch.bmm(w, x.T.expand(2, -1, -1)).movedim(2, 0),
            _vectors,
            lambda: (randn(2, 4, 3),),
            "first",
        ),
        _example(
            lambda x, w: torch.bmm(x[None], w)[0], _vectors, lambda: (randn(1, 3, 4),), "one matrix"
        ),
    ],
    "BaddbmmBackward0": [
        _example(
            lambda x, b, w: torch.baddbmm(b, x.expand(2, -1, -1), w, alpha=2, beta=3).mT.movedim(
                2, 0
            ),
            _vectors,
            lambda: (randn(4), randn(2, 3, 4)),
            "second",
        )
    ],
    "MvBackward0": [_example(lambda x, v: x @ v, _vectors, lambda: (randn(3),), "vector")],
    "ConvolutionBackward0": [
        _example(
            lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), groups=2),
            _images,
            lambda: (randn(6, 2, 2, 2), randn(6)),
            "strided, padded, dilated, grouped",
        ),
        _example(
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            _images,
            lambda: (randn(3, 4, 3, 3), randn(3)),
            "plain",
        ),
        _example(
            lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1),
            _images,
            lambda: (randn(4, 3, 2, 2),),
            "transposed",
        ),
        _example(
            lambda x, w, b: F.conv1d(x[:, :, 0], w, b),
            _images,
            lambda: (randn(3, 4, 2), randn(3)),
            "one dimension",
        ),
        _example(
            lambda x, w: F.conv3d(x[:, None], w), _images, lambda: (randn(2, 1, 2, 2, 2),), "three"
        ),
    ],
    "NativeLayerNormBackward0": [
        _example(
            lambda x, w, b: F.layer_norm(x, (3,), w, b),
            lambda n: (randn(n, 2, 3),),
            lambda: (randn(3), randn(3)),
            "last dimension",
        ),
        _example(
            lambda x, w: F.layer_norm(x, (2, 3), w),
            lambda n: (randn(n, 2, 3),),
            lambda: (randn(2, 3),),
            "two dimensions",
        ),
    ],
    "NativeGroupNormBackward0": [
        _example(lambda x, w, b: F.group_norm(x, 2, w, b), _images, _gains, "images")
    ],
    "NativeBatchNormBackward0": [
        _example(_normalized, _images, _gains, "images"),
        _example(_normalized, lambda n: (randn(n, 4),), _gains, "vectors"),
    ],
    "EmbeddingBackward0": [
        _example(lambda i, t: F.embedding(i, t, padding_idx=2), _tokens, _table, "with padding"),
        _example(lambda i, t: F.embedding(i[:, 0], t), _tokens, _table, "one of a sample"),
    ],
    "EmbeddingBagBackward0": [
        _example(lambda i, t: F.embedding_bag(i, t, mode="sum"), _tokens, _table, "sum"),
        _example(
            lambda i, t: F.embedding_bag(i, t, mode="mean", padding_idx=2), _tokens, _table, "mean"
        ),
    ],
    "IndexSelectBackward0": [
        _example(lambda i, t: t.index_select(0, i[:, 0]), _tokens, _table, "rows")
    ],
    "AddBackward0": [
        _example(lambda x, b: torch.add(x, b, alpha=3), _vectors, lambda: (randn(3),), "second"),
        _example(lambda x, b: b + x, _vectors, lambda: (randn(1, 1),), "first"),
    ],
    "ExpandBackward0": [_example(_token_for_all, _vectors, lambda: (randn(1, 2),), "a token")],
    "SubBackward0": [
        _example(lambda x, b: torch.sub(x, b, alpha=3), _vectors, lambda: (randn(3),), "second"),
        _example(lambda x, b: b - x, _vectors, lambda: (randn(()),), "first"),
    ],
    "MulBackward0": [
        _example(lambda x, s: x * s, _vectors, lambda: (randn(3),), "second"),
        _example(lambda x, s: s * x, _vectors, lambda: (randn(1, 3),), "first"),
    ],
    "DivBackward0": [
        _example(lambda x, s: x / s, _vectors, lambda: (randn(3).exp(),), "second"),
        _example(lambda x, s: s / x.exp(), _vectors, lambda: (randn(3),), "first"),
    ],
    "PreluKernelBackward0": [
        _example(F.prelu, lambda n: (randn(n, 3, 2),), lambda: (randn(3),), "channels")
    ],
}

REFUSED: dict[str, list[OperationExample]] = {
    "EmbeddingBackward0": [
        _example(
            lambda i, t: F.embedding(i, t, scale_grad_by_freq=True), _tokens, _table, "frequencies"
        )
    ],
    "EmbeddingBagBackward0": [
        _example(lambda i, t: F.embedding_bag(i, t, mode="max"), _tokens, _table, "max")
    ],
    "IndexSelectBackward0": [
        _example(
            lambda i, t: t.index_select(1, i[:, 0]).T, _tokens, lambda: (randn(2, 5),), "columns"
        )
    ],
}

# Kernels of accelerators, and one of float32 alone, whose rounding is above what the laws allow.
ELSEWHERE = {"CudnnBatchNormBackward0", "FusedRmsNormBackward0", "MkldnnRnnLayerBackward0"}


def test_every_closed_form_is_tried() -> None:
    assert RULES.keys() == EXAMPLES.keys() | ELSEWHERE


def test_a_rule_of_the_core_is_found_by_its_operation() -> None:
    [check, *_] = rule_checks("MvBackward0", *EXAMPLES["MvBackward0"])
    assert str(check).startswith("jdcore:matrix_and_vector")


for _operation, _examples in EXAMPLES.items():
    globals()[f"test_{_operation}"] = gramian_rule_tests(
        _operation, *_examples, refused=REFUSED.get(_operation, ())
    )
