from __future__ import annotations

import inspect
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import Parameter

from jdcore.errors import ParameterError


@frozen(eq=False)
class LayerCall:
    """
    One forward call of a layer and the gradients of the losses with respect to its outputs.

    This is all that a rule sees. Tensors are detached; half precision ones come as float32.

    :param module: The layer.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    :param training: Whether the layer was in training mode.
    :param batch_size: Number B of samples; 1 with ``batch_dim=None``. Sample b owns the entries
        ``b * r`` to ``(b + 1) * r`` of the first dimension of inputs and outputs.
    :param output_grads: One tensor ``[K, *output.shape]`` per output tensor; K is the number of
        losses per sample. None for outputs that no loss depends on.
    :param reached: The parameters that the losses depend on through this call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    batch_size: int
    output_grads: tuple[Tensor | None, ...]
    reached: frozenset[Parameter]

    @property
    def grads(self) -> Tensor:
        """The gradients of the only output, shape ``[K, *output.shape]``."""
        [grads] = self.output_grads
        assert grads is not None  # else the call is not reached
        return grads

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, however it was given."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def input(self) -> Tensor:
        """The first argument, whatever the layer calls it."""
        first = self.args[0] if self.args else None
        if first is None:
            first = self.kwargs[next(iter(inspect.signature(self.module.forward).parameters))]
        tensor: Tensor = first
        return tensor

    def wanted(self, name: str) -> Parameter | None:
        """The parameter of this name (dots reach submodules), or None if it plays no part."""
        parameter = self._attribute(name)
        return parameter if parameter in self.reached else None

    def value(self, name: str) -> Tensor | None:
        """The value of a parameter or buffer, detached and in the dtype of the computation."""
        tensor = self._attribute(name)
        return None if tensor is None else widened(tensor.detach())

    def _attribute(self, name: str) -> Any:
        path, _, attribute = name.rpartition(".")
        owner = self.module.get_submodule(path) if path else self.module
        return getattr(owner, attribute, None)

    def positions(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """
        Fold everything between sample and features into one dimension of positions.

        :param tensor: Shape ``[*leading, B * r, ..., features]``.
        :param leading: Number of dimensions before the samples: 1 for output gradients.
        :returns: Shape ``[*leading, B, T, features]``.
        """
        head = tensor.shape[:leading]
        return tensor.reshape(*head, self.batch_size, -1, tensor.shape[-1])


def widened(value: Any) -> Any:
    """Half precision tensors as float32, anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def check_batch(module_name: str, length: int, batch_size: int) -> None:
    """
    Refuse outputs whose first dimension cannot be the samples.

    :raises ParameterError: If it is no multiple of the number of samples.
    """
    if length % batch_size:
        raise ParameterError(
            "batch_dim",
            f"the dimension of the samples: the losses have {batch_size} entries along it",
            f"an output of `{module_name}` with {length} entries along its first dimension",
            "Give layers the samples first (batch_first=True), also tables of positions, whose "
            "indices expand to all samples; or use batch_dim=None.",
        )
