from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from attrs import Attribute, define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore.aggregation import Columns, MatrixAggregator, StateFields, state_field
from jdcore.errors import ParameterError
from jdcore.validators import describe_tensor, integer, real
from jdplugins.robust._rows import clipping_factors


def _vector(_: object, attribute: Attribute[Tensor], value: Tensor) -> None:
    if value.ndim != 1:
        raise ParameterError(attribute.name, "a vector", describe_tensor(value))


def _edge(columns: Columns, center: list[Tensor], scale: float) -> NDArray[np.float64]:
    """Products of the center with the rows and with itself [m + 1], in units of a scale."""
    products, squared = columns.inner(center, scale)
    both: NDArray[np.float64] = torch.cat([products, squared[None]]).cpu().numpy()  # one copy
    return both


def _nowhere() -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device="cpu")


@define(eq=False)
class CenteredClipping(StateFields, MatrixAggregator):
    """
    Mean of the rows, each clipped to a ball around the previous update.

    From the previous update v, ``n_iter`` times: ``v ← v + (1 / m) Σ_i (g_i - v) min(1, τ / ‖g_i -
    v‖)``. From `Learning from History for Byzantine Robust Optimization
    <https://arxiv.org/pdf/2012.10333>`_.

    Choose it against attacks that hide in the noise of every single step: no row moves the update
    by more than ``tau / m`` in an iteration, while honest rows agree over time. Give it momenta of
    the workers rather than raw gradients, as the paper does. The update does not scale with the
    matrix.

    Stateful: ``center`` [n] is the previous update, zero at first, in float32 at least. All calls
    between two :meth:`reset` must have the same number of columns.

    :param tau: Radius of the ball, in units of the gradients.
    :param n_iter: Number of iterations in a call.

    >>> import torch
    >>> from jdcore.aggregation import CenteredClipping
    >>> aggregator = CenteredClipping(tau=1.0)
    >>> aggregator(torch.tensor([[0.5], [0.7], [-100.0]]))  # the last is clipped to -1
    tensor([0.0667])
    >>> aggregator(torch.tensor([[0.5], [0.7], [-100.0]]))  # now to 0.0667 - 1
    tensor([0.0889])
    """

    needs_all_columns: ClassVar[bool] = True

    tau: float = field(default=100.0, validator=real(0.0))
    n_iter: int = field(default=1, validator=integer(1))
    center: Tensor = state_field(_nowhere, validator=_vector)

    def aggregate_finite(self, columns: Columns) -> list[Tensor]:
        center = self._previous(columns)
        gramian = columns.gramian().cpu().numpy()  # of the rows in units of the scale
        scale = columns.scale
        edge = _edge(columns, center, scale)
        if not np.isfinite(edge).all():
            # In units of the center, which is longer than the rows by more than has a square.
            longer = max(float(old.abs().max()) for old in center if len(old))
            gramian = gramian * (scale / longer) ** 2
            scale, edge = longer, _edge(columns, center, longer)
        # The Gramian of the rows and the centre: all that follows is found without a vector as long
        # as a row.
        bordered = np.vstack([np.column_stack([gramian, edge[:-1]]), edge])
        coefficients = self._clipped(bordered, self.tau / scale)
        moved = columns.combine(torch.from_numpy(coefficients[:-1]))
        kept = float(coefficients[-1])
        pairs = zip(moved, center, strict=True)
        centers = [torch.add(new.to(old.dtype), old, alpha=kept) for new, old in pairs]
        vectors = [now.to(new.dtype) for now, new in zip(centers, moved, strict=True)]
        # In memory of its own, as the caller gets the vectors.
        self.center = torch.cat(centers) if len(centers) > 1 else centers[0].clone()
        return vectors

    def _previous(self, columns: Columns) -> list[Tensor]:
        """The center, in blocks as the columns, but never in half precision."""
        if not columns.local:
            raise ParameterError(
                "aggregator",
                "one that needs no state of the size of a row, as columns lie on several processes",
                repr(self),
            )
        widths = [block.shape[1] for block in columns.blocks]
        # Steps of a clipped row are short beside the center, whose rounding would swallow them.
        wide = [torch.promote_types(block.dtype, torch.float32) for block in columns.blocks]
        if not len(self.center):
            pairs = zip(columns.blocks, wide, strict=True)
            return [block.new_zeros(block.shape[1], dtype=dtype) for block, dtype in pairs]
        if len(self.center) != sum(widths):
            raise ParameterError(
                "matrix",
                f"of {len(self.center)} columns, as in the calls before",
                f"one of {sum(widths)}",
                "Call reset() before the number of parameters changes.",
            )
        pieces = zip(torch.split(self.center, widths), wide, strict=True)
        return [piece.to(columns.device, dtype) for piece, dtype in pieces]

    def _clipped(self, bordered: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
        """
        The new center as a combination of the rows and of the old one.

        :param bordered: Gramian [m + 1, m + 1] of the rows and the old center.
        :returns: float64 coefficients [m + 1].
        """
        m = len(bordered) - 1
        coefficients: NDArray[np.float64] = np.eye(m + 1)[m]
        for _ in range(self.n_iter):
            offsets = bordered @ coefficients
            squared = np.diagonal(bordered) - 2.0 * offsets + coefficients @ offsets
            lengths = np.sqrt(np.maximum(squared[:m], 0.0))
            shares = clipping_factors(lengths, tau) / m
            coefficients *= 1.0 - shares.sum()
            coefficients[:m] += shares
        return coefficients
