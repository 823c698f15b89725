"""The modes of torch that our own arithmetic must not inherit from the code around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Our own products are not those of the user's forward pass."""
    # Entering autocast costs as much as some layers, also where nothing is to be turned off.
    enabled = _casts(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def plain_modes(tensors: Iterable[Tensor]) -> AbstractContextManager[object]:
    """
    Leave autocast and inference mode, for the time of a ``with`` block.

    Under autocast, products of float32 gradients would be rounded to half precision, and torch
    wants backward passes outside of it, too: they run in the dtypes of the forward pass. Results of
    inference mode could not be added to later.

    :param tensors: Those on whose devices something is computed.
    """
    devices = {tensor.device.type for tensor in tensors}
    # Asked first: to enter a mode costs more than the question, and drops autocast's cache.
    inference = torch.is_inference_mode_enabled()
    casting = [device for device in devices if _casts(device)]
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


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor exists inside of a transform of ``torch.func`` only."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
