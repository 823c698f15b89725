"""The modes of torch that our own arithmetic must not inherit from the code around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jdcore.errors import ParameterError

# Calls of ours around those of torch would take longer.
# Whether autocast is on for any device.
casts_anywhere = torch._C._is_any_autocast_enabled
# Whether a tensor exists inside of a transform of ``torch.func`` only.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
# The transform of ``torch.func`` that this code runs in, or None.
innermost_transform = torch._C._functorch.peek_interpreter_stack


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Our own products are not those of the user's forward pass."""
    # Entering autocast costs as much as some layers, also where nothing is to be turned off.
    enabled = _casts(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


# The setting of a kind of operation, or what it inherits. Its attribute in `torch.backends` takes
# fifteen times as long, more than small products.
_precision = torch._C._get_fp32_precision_getter


class _Exact:
    """
    Keeps the settings of one kind of operation exact, for the time of ``with`` blocks.

    They are those of the whole process, while each accelerator has a thread of autograd that makes
    products of ours: the first one in sets them, and the last one out brings them back.

    :param device: That of the settings: oneDNN has those of CPUs and of Intel's accelerators.
    :param operation: The kind.
    :param settings: The same in ``torch.backends``.
    """

    def __init__(self, device: str, operation: str, settings: Any) -> None:
        self.of, self._settings = (device, operation), settings
        self._lock, self.inside, self._before = Lock(), 0, ""

    def __enter__(self) -> None:
        with self._lock:
            if not self.inside:
                before = self._settings.fp32_precision
                # What is inherited stays so: it is to follow the setting of its device, or of all,
                # that users change later, or meanwhile.
                self._settings.fp32_precision = "none"
                inherited = self._settings.fp32_precision == before
                self._before = "none" if inherited else before
                self._settings.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1
            if not self.inside:
                self._settings.fp32_precision = self._before


_on_cuda, _elsewhere, _cudnn = torch.backends.cuda, torch.backends.mkldnn, torch.backends.cudnn
_EXACT = {
    (True, "matmul"): _Exact("cuda", "matmul", _on_cuda.matmul),
    (True, "conv"): _Exact("cuda", "conv", _cudnn.conv),  # type: ignore[attr-defined]
    (False, "matmul"): _Exact("mkldnn", "matmul", _elsewhere.matmul),  # type: ignore[attr-defined]
    (False, "conv"): _Exact("mkldnn", "conv", _elsewhere.conv),  # type: ignore[attr-defined]
}
_AS_IT_IS = nullcontext()


def exact_products(factor: Tensor, operation: str = "matmul") -> AbstractContextManager[None]:
    """
    Keep TF32 and bfloat16, which round float32 to three digits, out of our own products.

    Users set them for their models (``torch.set_float32_matmul_precision``), on CPUs as well. Their
    settings are as before afterwards.

    :param factor: One of the factors.
    :param operation: "matmul", or "conv" for a convolution.
    """
    return rounding(factor, operation) or _AS_IT_IS


def rounding(factor: Tensor, operation: str = "matmul") -> AbstractContextManager[None] | None:
    """:func:`exact_products` where it is needed; else None, since an empty context takes time."""
    if factor.dtype is torch.float32:
        exact = _EXACT[factor.is_cuda, operation]
        # What another thread keeps exact now will round once that is done.
        if exact.inside or _precision(*exact.of) in ("tf32", "bf16"):
            return exact
    return None


def plain_modes(tensors: Iterable[Tensor]) -> AbstractContextManager[object]:
    """
    Leave autocast and inference mode, for the time of a ``with`` block.

    Under autocast, products of float32 gradients would be rounded to half precision, and torch
    wants backward passes outside of it, too: they run in the dtypes of the forward pass. Results of
    inference mode could not be added to later.

    :param tensors: Those on whose devices something is computed.
    """
    # Each device once, as to name its type takes longer than to ask a tensor for it.
    devices = {device.type for device in {tensor.device for tensor in tensors}}
    # Asked first: to enter a mode costs more than the question, and drops autocast's cache.
    inference = torch.is_inference_mode_enabled()
    casting = [device for device in devices if _casts(device)] if casts_anywhere() else []
    return _left(inference, casting) if inference or casting else nullcontext()


def _casts(device_type: str) -> bool:
    # Of devices without autocast, torch refuses to tell: parameters on "meta" may be among those
    # that get nothing.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


@contextmanager
def _left(inference: bool, casting: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        if inference:
            stack.enter_context(torch.inference_mode(False))
        for device in casting:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def is_inside_of(*kinds: str) -> bool:
    """
    Whether the innermost transform of ``torch.func`` around this code is one of some.

    :param kinds: Names of ``TransformType``.
    """
    transform = innermost_transform()
    return transform is not None and transform.key().name in kinds


@contextmanager
def without_transforms() -> Iterator[None]:
    """Leave the transforms of ``torch.func``, for the time of a ``with`` block."""
    functorch, left = torch._C._functorch, []
    try:
        while innermost_transform() is not None:
            left.append(functorch.pop_dynamic_layer_stack())
        yield
    finally:
        while left:
            functorch.push_dynamic_layer_stack(left.pop())


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor is a dual one of the innermost level of forward-mode AD."""
    # Asked first whether there is a level: this is called for each block of a step.
    if forward_ad._current_level < 0:
        return False
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def refuse_tangents(tensors: Iterable[Tensor], parameter: str) -> None:
    """
    Refuse dual tensors of forward-mode AD, for what does not differentiate by them.

    :raises ParameterError: If one of them carries a tangent.
    """
    # Asked first: this is called at each step, and there is hardly ever a level.
    if forward_ad._current_level >= 0 and any(map(has_tangent, tensors)):
        raise ParameterError(
            parameter,
            "without a tangent of forward-mode AD, which would be lost",
            "a dual Tensor",
            "Give its numbers: torch.autograd.forward_ad.unpack_dual(tensor).primal.",
        )


def without_graph(tensor: Tensor) -> Tensor:
    """
    A tensor outside of the graph of reverse mode, still with its tangent of forward-mode AD.

    ``detach`` drops the tangent, too, and who computes with the numbers could not refuse it.

    :param tensor: Of any shape and dtype.
    :returns: It itself where it does not require grad.
    """
    if not tensor.requires_grad:
        return tensor
    if not has_tangent(tensor):
        return tensor.detach()
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    dual: Tensor = forward_ad.make_dual(primal.detach(), tangent.detach())  # type: ignore[no-untyped-call]
    return dual
