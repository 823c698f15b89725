"""
Operations whose derivative is the same for many gradients at once as for one after the other.

Not all are: torch batches the derivatives of ``cdist`` and ``as_strided_scatter``, and of ``roll``
for a tensor without dimensions, wrongly without a word, and others by a loop. Those that are named
here are compared with single passes by the tests, for all supported versions of torch; no other one
is ever batched here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jdcore.graph._saved import Unreadable, has_unpack_hooks, results_of, saved

_TEXT = """
    Add Sub Rsub Mul Div Neg Exp Exp2 Expm1 Log Log1P Log2 Log10 Sqrt Rsqrt Sigmoid Tanh Sin Cos
    Tan Sinh Cosh Asin Acos Atan Asinh Acosh Atanh Erf Erfc Gelu Silu Mish Softplus LogSigmoid Elu
    LeakyRelu Abs Reciprocal Relu Threshold Hardtanh Hardswish Hardsigmoid Clamp ClampMin ClampMax
    Pow MaskedFill Where Maximum Minimum Clone ToCopy Alias View UnsafeView T Expand Unsqueeze
    Squeeze Transpose Permute Slice Select Split UnsafeSplit SplitWithSizes Unbind Cat Stack Sum
    Mean Var Logsumexp Softmax LogSoftmax Amax Amin Mm Addmm Bmm Baddbmm Mv Dot
    NativeLayerNorm NativeGroupNorm NativeBatchNorm Embedding Index IndexSelect Gather MseLoss
    SmoothL1Loss BinaryCrossEntropy BinaryCrossEntropyWithLogits NllLoss Convolution
    MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D ConstantPadNd LinalgVectorNorm
    ScaledDotProductFlashAttentionForCpu
"""
BATCHABLE = frozenset(_TEXT.split())

_WRONG = frozenset({"CdistBackward0", "AsStridedScatterBackward0"})
_WRONG_FOR_NUMBERS = frozenset({"RollBackward0"})

# An argument of this operation says whether its gradient is sparse.
EMBEDDING = "EmbeddingBackward0"


def is_batchable(name: str, node: Any) -> bool:
    """
    Whether an operation is named above, and keeps what it saved as it is.

    A checkpoint, or tensors that are moved away and back, would run Python code inside of the pass.
    """
    return is_listed(name) and not has_unpack_hooks(node) and not is_sparse(name, node)


def is_listed(name: str) -> bool:
    """Whether an operation is named above."""
    # The name of a Python function's node ends with "Backward", that of torch's operations with the
    # number of an overload.
    base, _, version = name.partition("Backward")
    return base in BATCHABLE and version.isdigit()


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
    names = frozenset(nodes.values())
    if names & _WRONG:
        return True
    if not names & _WRONG_FOR_NUMBERS:
        return False
    return any(
        name in _WRONG_FOR_NUMBERS and len(results_of(node)[0]) == 1  # the dtype alone
        for node, name in nodes.items()
    )
