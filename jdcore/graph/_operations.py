"""
What is known of the operations of torch, by the names of their nodes: one table that all ask.

An operation is **batched** if its derivative is the same for many gradients at once as for one
after the other. Not all are: torch batches those of ``cdist`` and ``as_strided_scatter``, and of
``roll`` for a tensor without dimensions, wrongly without a word, and others, "looped" ones, by a
loop. Those that are named here are compared with single passes by the tests, for all supported
versions of torch; no other one is ever batched.

It is **steady** if names, shapes and integers alone decide which entries of its operands its
results depend on. Where samples are is shown once for each kind of graph of such operations; what
is not named (an index, a routing, functions of third parties) is shown again at every call. Of some
steady ones the **data** choose among the entries that count: each by itself, or along a dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from jdcore.graph._saved import Unreadable, has_unpack_hooks, results_of, saved, saved_sparse

# Facts of all operations of a line. Those that "rearrange" leave inner products as they are, and
# "straight" ones entries in their places; results of a "part" do not overlap; a "join" puts its
# operands side by side. "along": operands have their samples where the result has them. "product":
# the entries of a sparse factor decide which of the other one matter. Logcumsumexp chooses no
# entry, but its derivative compares gradients with zero, which loses NaN.
_TABLE = """
    batched steady rearrange straight: Clone ToCopy Alias
    batched steady rearrange: View UnsafeView T Unsqueeze Squeeze Transpose Permute
    steady rearrange: ReshapeAlias
    batched steady part: Split UnsafeSplit SplitWithSizes Unbind
    batched steady join: Cat Stack
    batched steady along-all: Add Sub
    batched steady along-all product: Mul Div
    batched steady product: Mm Addmm Bmm Baddbmm Mv
    steady product: Addbmm Addmv
    batched steady along-first: Exp Log Tanh Sigmoid Gelu Softmax LogSoftmax NativeLayerNorm
        NativeGroupNorm NativeBatchNorm
    steady along-first: CudnnBatchNorm
    batched steady: Rsub Neg Exp2 Expm1 Log1P Log2 Log10 Sqrt Rsqrt Sin Cos Tan Sinh Cosh Asin Acos
        Atan Asinh Acosh Atanh Erf Erfc Silu Softplus LogSigmoid Elu LeakyRelu Abs Reciprocal
        Expand Slice Select Sum Mean Var Logsumexp Amax Amin Dot MseLoss SmoothL1Loss
        BinaryCrossEntropy BinaryCrossEntropyWithLogits Convolution AvgPool2D AdaptiveAvgPool2D
        ConstantPadNd
    batched looped steady: Mish ScaledDotProductFlashAttentionForCpu
    steady: Erfinv MT Addcmul Addcdiv Lerp Logaddexp Logaddexp2 Vdot Addr Linear Trilinear
        SlowConvTranspose2D SlowConv2D ThnnConv2D ConvDepthwise2D CudnnConvolution MkldnnLinear
        FusedRmsNorm MiopenBatchNorm Glu VarMean Cumsum Movedim Flip Rot90 Diagonal DiagEmbed Tril
        Triu ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D
        ReplicationPad3D Repeat Unfold Im2Col Col2Im AvgPool3D AdaptiveAvgPool3D UpsampleNearest1D
        UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D
        UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D PixelShuffle
        PixelUnshuffle NativeDropout HuberLoss KlDiv SoftMarginLoss Celu Copy ThnnFusedLstmCell
        ThnnFusedGruCell MkldnnRnnLayer ScaledDotProductFlashAttention
        ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention
        ScaledDotProductFusedAttentionOverrideable
    batched steady data along-first: Relu Pow
    batched steady data: Threshold Hardtanh Hardswish Hardsigmoid Clamp ClampMin ClampMax MaskedFill
        Where Maximum Minimum
    steady data: Hardshrink Softshrink Fmax Fmin NanToNum Xlogy XLog1Py Atan2 Hypot Sinc PreluKernel
    batched steady data-of-last-2: MaxPool2DWithIndices
    steady data-of-last-2: MkldnnMaxPool2D AdaptiveMaxPool2D
    steady data-of-last-3: MaxPool3DWithIndices MkldnnMaxPool3D AdaptiveMaxPool3D
    batched steady data-of-classes: NllLoss
    steady data-of-classes: NllLoss2D
    batched steady data-of-dim: LinalgVectorNorm
    steady data-of-dim: Max Min Median Nanmedian Kthvalue Mode Cummax Cummin Norm Std Logcumsumexp
    batched: Embedding Index IndexSelect Gather
    wrong-if-batched: Cdist AsStridedScatter
    steady wrong-for-numbers-if-batched: Roll
"""


def having(fact: str) -> frozenset[str]:
    """The operations of which a fact is known, as :func:`operation` calls them."""
    found, known = set[str](), list[str]()
    for line in _TABLE.splitlines():
        facts, colon, names = line.rpartition(":")
        known = facts.split() if colon else known  # the line before goes on
        found.update(names.split() if fact in known else ())
    return frozenset(found)


REARRANGING = having("rearrange")
"""Operations that only rearrange what they are given."""
PARTS = having("part")
"""Operations whose results are parts of what they are given that do not overlap."""
_BATCHED, _STEADY, _PRODUCTS = having("batched"), having("steady"), having("product")
_BATCHED_AS_ONE = _BATCHED - having("looped")
_WRONG, _WRONG_FOR_NUMBERS = having("wrong-if-batched"), having("wrong-for-numbers-if-batched")

MATRIX_PRODUCTS = {"AddmmBackward0": (2, "mat1"), "MmBackward0": (1, "self")}
"""By node: which operand is the weight, and under which name the one before it is saved."""

# Operations whose last two operands are matrices that are multiplied.
_OF_TWO_MATRICES = frozenset({"Mm", "Addmm", "Bmm", "Baddbmm"})

# An argument of this operation says whether its gradient is sparse.
EMBEDDING = "EmbeddingBackward0"

# The dimensions along which data choose; none stands for entry by entry.
_DATA_ALONG: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(having("data"), ()),
    **dict.fromkeys(having("data-of-classes"), (1,)),
    **dict.fromkeys(having("data-of-last-2"), (-2, -1)),
    **dict.fromkeys(having("data-of-last-3"), (-3, -2, -1)),
}
_DATA_OF_DIM = having("data-of-dim")

# Functions of Python of which it is known that their backward hands gradients on as they are.
_HANDING_ON: set[str] = set()


@cache
def operation(name: str) -> str:
    """
    The operation of torch that a node is of, whatever its overload; empty for functions.

    :param name: The name of the node.
    """
    # The name of a Python function's node ends with "Backward", that of torch's operations with the
    # number of an overload: `squeeze()` has 0, `squeeze(dim)` 1, and `squeeze(dims)` 2.
    base, _, overload = name.partition("Backward")
    return base if overload.isdigit() else ""


# -- several gradients at once ---------------------------------------------------------------------


def is_batchable(name: str, node: Any) -> bool:
    """
    Whether an operation is batched, and keeps what it saved as it is.

    A checkpoint, or tensors that are moved away and back, would run Python code inside of the pass.
    """
    return is_listed(name) and not has_unpack_hooks(node) and not is_sparse(name, node)


def is_listed(name: str) -> bool:
    """Whether an operation is known to be batched rightly."""
    return operation(name) in _BATCHED


def some_looped(names: Iterable[str]) -> bool:
    """Whether torch may batch one of some operations by a loop, of which it warns."""
    return not _BATCHED_AS_ONE.issuperset(map(operation, names))


def is_sparse(name: str, node: Any) -> bool:
    """Whether an operation gives a sparse gradient, which cannot be batched."""
    if name != EMBEDDING:
        return False
    try:
        return bool(saved(node, "sparse"))
    except Unreadable:
        return True


def some_batched_wrongly(nodes: Mapping[Any, str]) -> bool:
    """
    Whether torch batches the derivative of one of some operations wrongly, without a word.

    :param nodes: The operations, with their names.
    """
    names = set(map(operation, set(nodes.values())))
    if not names.isdisjoint(_WRONG):
        return True
    return not names.isdisjoint(_WRONG_FOR_NUMBERS) and any(
        operation(name) in _WRONG_FOR_NUMBERS and len(results_of(node)[0]) == 1  # the dtype alone
        for node, name in nodes.items()
    )


# -- which entries depend on which -----------------------------------------------------------------


def note_handing_on(names: Iterable[str]) -> None:
    """
    Say of functions of Python that their backward hands gradients on as they are.

    :param names: Their names in the graph.
    """
    _HANDING_ON.update(names)


def is_steady(name: str) -> bool:
    """Whether the form of an operation alone decides which entries depend on which."""
    return operation(name) in _STEADY or name in _HANDING_ON


def is_sparse_product(name: str, node: Any) -> bool:
    """Whether an operation that is steady otherwise is not, as a factor of it is sparse."""
    return operation(name) in _PRODUCTS and saved_sparse(node)


def sizes_decide(name: str, operands: Sequence[tuple[int, int]], dims: Collection[int]) -> bool:
    """
    Whether sizes that no graph shows decide which entries of an operation depend on which.

    They are those of operands that require no gradient, of which a graph has nothing.

    :param operands: Where its operands come from; node -1 for those.
    :param dims: The dimensions of its results that samples lie along.
    """
    constant = [node < 0 for node, _ in operands]
    if operation(name) == "Cat":
        # The size of one run of them follows from the whole; of several, where the others lie does
        # not.
        return [*zip([False, *constant], constant, strict=False)].count((False, True)) > 1
    # Kernels of different sizes may give results of the same one.
    return "Conv" in name and constant[1:2] == [True] and max(dims, default=2) > 1


def spread(
    name: str, node: Any
) -> Callable[[Sequence[Tensor | None], Sequence[Tensor | None]], Any] | None:
    """
    Some operations pass gradients on to entries that data choose, such as a rectifier.

    What they make of NaN does not show all that may depend on it for other data. And products of
    bfloat16 show too much on CPUs: oneDNN reads rows of odd length beyond their ends, into the next
    ones, and multiplies what it finds there by zero, which leaves NaN.

    :returns: A hook of the node that hands NaN on to all these entries, None if none is needed.
    """
    if operation(name) in _OF_TWO_MATRICES:
        return partial(_hand_on_to_factors, node)
    dims = _DATA_ALONG.get(operation(name))
    if operation(name) in _DATA_OF_DIM:
        dims = _dims_of(node)
    if dims is None:
        return None

    def hand_on(
        found: Sequence[Tensor | None], given: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...] | None:
        grad = given[0]
        if grad is None:
            return None
        return tuple(None if g is None else _spread(g, grad, dims) for g in found)

    return hand_on


def _hand_on_to_factors(
    node: Any, found: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    grad = given[0]
    if grad is None or grad.dtype != torch.bfloat16 or not grad.is_cpu or saved_sparse(node):
        return None
    poisoned = grad.isnan()
    # Rows of the first factor are in the same row of the product, columns of the second in the same
    # column.
    factors = [
        None if g is None else torch.zeros_like(g).masked_fill(poisoned.any(dim, True), torch.nan)
        for g, dim in zip(found[-2:], (-1, -2), strict=True)
    ]
    return (*found[:-2], *factors)


def _dims_of(node: Any) -> tuple[int, ...]:
    """Those that are chosen from; none stands for all."""
    try:
        dims = saved(node, "dim")
    except Unreadable:
        return ()
    if dims is None:
        return ()
    # Torch shows negative ones unsigned.
    found = [int(d) for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]
    return tuple(d - (1 << 64) if d >= 1 << 63 else d for d in found)


def _spread(found: Tensor, given: Tensor, dims: tuple[int, ...]) -> Tensor:
    # Zero where a gradient is finite, NaN where it is not: adding it spreads the poison alone.
    nothing = given * 0
    # In the dtype of this operand, which may be another one than that of the result.
    if nothing.is_complex() and not found.is_complex():
        nothing = nothing.real + nothing.imag
    nothing = nothing.to(found.dtype)
    if nothing.ndim == 0 or (not dims and found.ndim <= nothing.ndim):
        return found + nothing.sum_to_size(found.shape if nothing.ndim else ())
    missing = found.ndim - nothing.ndim
    places = sorted(d % found.ndim for d in dims)
    if missing:
        for place in places:
            nothing = nothing.unsqueeze(place)
    return found + nothing.sum(places, keepdim=True)
