from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define
from torch import Tensor

from jdcore._modes import without_autocast
from jdcore.aggregation._row_vectors import check_row_vectors
from jdcore.errors import ParameterError, ParameterTypeError, left_out
from jdcore.scalarization._losses import check_losses
from jdcore.validators import describe_tensor


@define(eq=False)
class LossScalarizer:
    """
    Base class that gives a scalarizer the laws of :class:`~jdcore.Scalarizer`.

    A subclass is an attrs class (``@define(eq=False)``) that implements :meth:`scalarize` and need
    not think of half precision nor of empty input. A field whose validator is
    :func:`jdcore.validators.row_vector` is checked against the number of losses and the device at
    each call.
    """

    def scalarize(self, losses: Tensor) -> Tensor:
        """
        :param losses: Losses [m] of float32 or float64 with m >= 1. Must not be modified.
        :returns: One loss [], in the same dtype on the same device.
        """
        raise left_out(self, "scalarize")

    def __call__(self, losses: Tensor, /) -> Tensor:
        """
        :param losses: Values of the objectives, real floating Tensor [m].
        :returns: One loss, Tensor [] of the same dtype on the same device.
        :raises ParameterError: If the losses are no real floating vector, or an argument does not
            fit them.
        """
        check_losses(losses)
        check_row_vectors(self, len(losses), losses)
        return _scalarized(self.scalarize, losses)


@define(eq=False)
class WeightedSum(LossScalarizer):
    """Base class of scalarizers that multiply the losses with weights, which are constants."""

    def weights(self, m: int, dtype: torch.dtype) -> Tensor:
        """
        :param m: Number of losses, at least 1.
        :param dtype: float32 or float64.
        :returns: Weights [m] of this dtype, on any device.
        """
        raise left_out(self, "weights")

    def scalarize(self, losses: Tensor) -> Tensor:
        return self.weights(len(losses), losses.dtype).to(losses.device) @ losses


class TrainableScalarizer(torch.nn.Module):
    """
    Base class of scalarizers with a parameter for each loss, which goes to the optimizer.

    A subclass implements :meth:`scalarize`, and multiplies or adds ``self.logits``, which start at
    zero.

    :param n_losses: Number of losses.
    """

    def __init__(self, n_losses: int) -> None:
        super().__init__()
        if isinstance(n_losses, bool) or not isinstance(n_losses, int):
            raise ParameterTypeError("n_losses", "an int", repr(n_losses))
        if n_losses < 0:
            raise ParameterError("n_losses", ">= 0", n_losses)
        self.n_losses = n_losses
        self.logits = torch.nn.Parameter(torch.zeros(n_losses, device=torch.get_default_device()))

    def scalarize(self, losses: Tensor, logits: Tensor) -> Tensor:
        """
        :param losses: Losses [m] of float32 or float64 with m >= 1. Must not be modified.
        :param logits: The parameters [m], in the same dtype.
        :returns: One loss [], in the same dtype on the same device.
        """
        raise left_out(self, "scalarize")

    def forward(self, losses: Tensor, /) -> Tensor:
        """
        :param losses: Values of the objectives, real floating Tensor [m].
        :returns: One loss, Tensor [] of the same dtype on the same device.
        :raises ParameterError: If the losses are no real floating vector of ``n_losses`` entries,
            or lie on another device than the parameters.
        """
        check_losses(losses)
        if len(losses) != self.n_losses:
            raise ParameterError("losses", f"{self.n_losses} values", describe_tensor(losses))
        if losses.device != self.logits.device:
            raise ParameterError(
                "losses",
                f"on {self.logits.device}, the device of the parameters",
                f"a Tensor on {losses.device}",
                f"Move the scalarizer: scalarizer.to({str(losses.device)!r}).",
            )
        # The parameters stay in the dtype that their optimizer knows.
        return _scalarized(lambda wide: self.scalarize(wide, self.logits.to(wide.dtype)), losses)

    def extra_repr(self) -> str:
        return f"n_losses={self.n_losses}"


def _scalarized(scalarize: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor:
    # A zero that is still a part of the graph, so that a step without tasks can go on.
    if not len(losses):
        return losses.sum()
    wide = torch.promote_types(losses.dtype, torch.float32)
    # Losses are often put together where they are made, which may be under autocast.
    with without_autocast(losses.device.type):
        return scalarize(losses.to(wide)).to(losses.dtype)
