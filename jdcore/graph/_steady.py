"""
Which entries of an operation's operands its results depend on, as far as data decide it.

Where samples are is shown once for each kind of graph if names, shapes and integers alone decide
how entries depend on each other. Of the operations of torch this holds for most; those that are
not named here (an index, a routing, functions of third parties) are shown again at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from jdcore.graph._form import Place
from jdcore.graph._saved import Unreadable, saved, saved_sparse


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALWAYS = _names(
    """
    Add Sub Rsub Mul Div Neg Exp Exp2 Expm1 Log Log1P Log2 Log10 Sqrt Rsqrt Sigmoid Tanh Sin Cos
    Tan Sinh Cosh Asin Acos Atan Asinh Acosh Atanh Erf Erfc Erfinv Gelu Silu Mish Softplus
    LogSigmoid Elu LeakyRelu Abs Reciprocal Clone ToCopy Alias View UnsafeView ReshapeAlias T MT
    Expand Unsqueeze Squeeze Addcmul Addcdiv Lerp Logaddexp Logaddexp2 Mm Addmm Bmm Baddbmm
    Addbmm Addmv Mv Dot Vdot Addr Linear Trilinear Convolution SlowConvTranspose2D SlowConv2D
    ThnnConv2D ConvDepthwise2D CudnnConvolution MkldnnLinear NativeLayerNorm FusedRmsNorm
    NativeGroupNorm NativeBatchNorm CudnnBatchNorm MiopenBatchNorm Softmax LogSoftmax Glu Sum
    Mean Var VarMean Logsumexp Cumsum Amax Amin Cat Stack Split UnsafeSplit
    SplitWithSizes Unbind Slice Select Transpose Permute Movedim Flip Roll Rot90 Diagonal
    DiagEmbed Tril Triu ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D
    ReplicationPad1D ReplicationPad2D ReplicationPad3D Repeat Unfold Im2Col Col2Im
    AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D UpsampleNearest1D UpsampleNearest2D
    UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleLinear1D
    UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D PixelShuffle PixelUnshuffle
    NativeDropout MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits
    KlDiv SoftMarginLoss Celu Copy ThnnFusedLstmCell ThnnFusedGruCell MkldnnRnnLayer
    ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention
    ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention
    ScaledDotProductFusedAttentionOverrideable
    """
)

_ENTRY_BY_ENTRY = _names(
    """
    Relu Threshold Hardtanh Hardswish Hardsigmoid Hardshrink Softshrink Clamp ClampMin ClampMax
    MaskedFill Where Maximum Minimum Fmax Fmin NanToNum Xlogy XLog1Py Pow Atan2 Hypot Sinc
    PreluKernel
    """
)

_LAST_DIMENSIONS = {
    "MaxPool2DWithIndices": 2,
    "MkldnnMaxPool2D": 2,
    "AdaptiveMaxPool2D": 2,
    "MaxPool3DWithIndices": 3,
    "MkldnnMaxPool3D": 3,
    "AdaptiveMaxPool3D": 3,
}

# The last one chooses none, but its derivative compares gradients with zero, which loses NaN.
_CHOSEN_DIMENSIONS = _names(
    """
    Max Min Median Nanmedian Kthvalue Mode Cummax Cummin LinalgVectorNorm Norm Std
    Logcumsumexp
    """
)
_CLASSES = ("NllLoss", "NllLoss2D")

_STEADY = {*_ALWAYS, *_ENTRY_BY_ENTRY, *_LAST_DIMENSIONS, *_CHOSEN_DIMENSIONS, *_CLASSES}


# Of a sparse matrix, entries decide which entries of the other factor matter.
_PRODUCTS = _names("Mm Addmm Bmm Baddbmm Addbmm Mv Addmv Mul Div")


_HANDING_ON: set[str] = set()


def note_handing_on(names: Iterable[str]) -> None:
    """
    Say of functions of Python that their backward hands gradients on as they are.

    :param names: Their names in the graph.
    """
    _HANDING_ON.update(names)


def is_steady(name: str) -> bool:
    """Whether the form of an operation alone decides which entries depend on which."""
    return _base(name) in _STEADY or name in _HANDING_ON


def is_sparse_product(name: str, node: Any) -> bool:
    """Whether an operation that is steady otherwise is not, as a factor of it is sparse."""
    return _base(name) in _PRODUCTS and saved_sparse(node)


def sizes_decide(name: str, operands: Sequence[Place], dims: Collection[int]) -> bool:
    """
    Whether sizes that no graph shows decide which entries of an operation depend on which.

    They are those of operands that require no gradient, of which a graph has nothing.

    :param operands: Where its operands come from; node -1 for those.
    :param dims: The dimensions of its results that samples lie along.
    """
    constant = [node < 0 for node, _ in operands]
    if _base(name) == "Cat":
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

    What they make of NaN does not show all that may depend on it for other data.

    :returns: A hook of the node that hands NaN on to all these entries, None if none is needed.
    """
    base = _base(name)
    if base in _ENTRY_BY_ENTRY:
        dims: tuple[int, ...] = ()
    elif base in _LAST_DIMENSIONS:
        dims = tuple(range(-_LAST_DIMENSIONS[base], 0))
    elif base in _CLASSES:
        dims = (1,)
    elif base in _CHOSEN_DIMENSIONS:
        dims = _dims_of(node)
    else:
        return None

    def hand_on(
        found: Sequence[Tensor | None], given: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...] | None:
        grad = given[0]
        if grad is None:
            return None
        return tuple(None if g is None else _spread(g, grad, dims) for g in found)

    return hand_on


def _base(name: str) -> str:
    return name.partition("Backward")[0]


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
    if nothing.ndim == 0 or (not dims and found.ndim <= nothing.ndim):
        return found + nothing.sum_to_size(found.shape if nothing.ndim else ())
    missing = found.ndim - nothing.ndim
    places = sorted(d % found.ndim for d in dims)
    if missing:
        for place in places:
            nothing = nothing.unsqueeze(place)
    return found + nothing.sum(places, keepdim=True)
