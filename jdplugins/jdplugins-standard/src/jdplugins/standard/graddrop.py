from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from attrs import Attribute, define, field
from torch import Tensor

from jdcore.aggregation import CoordinatewiseAggregator
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.validators import describe_tensor, generator, row_vector


def identity(purity: Tensor) -> Tensor:
    """The purity itself, the default of :class:`GradDrop`."""
    return purity


def _name(function: Callable[[Tensor], Tensor]) -> str:
    return getattr(function, "__name__", repr(function))


def _callable(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if not callable(value):
        raise ParameterTypeError(attribute.name, "a function of a Tensor", repr(value))


@define(eq=False)
class GradDrop(CoordinatewiseAggregator):
    """
    Gradient sign dropout: each coordinate keeps its positive or its negative entries only.

    With S the sum of the entries of a coordinate and A the sum of their magnitudes, the sign purity
    is ``P = (1 + S / A) / 2``. Positive entries are kept with probability ``f(P)``, else negative
    ones, and summed up. From `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
    Dropout <https://arxiv.org/pdf/2010.06808>`_.

    Choose it when noise helps to leave joint minima of few objectives. Coordinates with entries of
    one sign only are never changed (for the default f). It sees single coordinates: it is an
    aggregator only, not a weighting of the Gramian.

    :param f: Increasing function from purities to probabilities, applied entry-wise to a Tensor of
        numbers in [0, 1] (a portion of the coordinates at a time). The default is the identity.
    :param leak: Tensor [m]: fraction of each row, in [0, 1], that is let through in any case. None
        stands for zeros.
    :param generator: Source of the random numbers, on any device; the default generator of the
        device of J if None.

    >>> import torch
    >>> from jdcore.aggregation import GradDrop
    >>> aggregator = GradDrop(f=lambda purity: (purity > 0.5).to(purity.dtype))
    >>> aggregator(torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, 4.0]]))
    tensor([ 3., -2.,  7.])
    """

    needs_all_columns: ClassVar[bool] = True

    f: Callable[[Tensor], Tensor] = field(default=identity, validator=_callable, repr=_name)
    leak: Tensor | None = field(default=None, validator=row_vector)
    generator: torch.Generator | None = field(
        default=None, kw_only=True, repr=False, validator=generator
    )

    def check_rows(self, m: int) -> None:
        """
        Refuse fractions to let through that are none.

        :param m: Number of rows.
        :raises ParameterError: If an entry of ``leak`` is not in [0, 1].
        """
        leak = self.leak
        if leak is not None and not bool(((leak >= 0.0) & (leak <= 1.0)).all()):
            raise ParameterError("leak", "a vector of fractions in [0, 1]", leak.tolist())

    def compute(self, columns: Tensor) -> Tensor:
        positive, negative = _signed_sums(columns.sum(0, dtype=torch.float64), columns.abs())
        purity = (positive / (positive - negative)).nan_to_num_(0.0)  # of a column of zeros
        keep_positive = self._probability(purity) > self._uniform(purity)
        if self.leak is None:
            return torch.where(keep_positive, positive, negative)
        leaked = self.leak.double()[:, None] * columns
        held = columns - leaked
        kept = torch.where(keep_positive, *_signed_sums(held.sum(0), held.abs()))
        return kept + leaked.sum(0)

    def _probability(self, purity: Tensor) -> Tensor:
        probability = self.f(purity)
        if not isinstance(probability, Tensor) or probability.shape != purity.shape:
            raise ParameterError(
                "f", "a function that keeps the shape of a Tensor", describe_tensor(probability)
            )
        return probability

    def _uniform(self, like: Tensor) -> Tensor:
        device = like.device if self.generator is None else self.generator.device
        # In float32 for all dtypes of J, so that a seed stands for the same signs.
        uniform = torch.rand(
            len(like), generator=self.generator, dtype=torch.float32, device=device
        )
        return uniform.to(like.device)


def _signed_sums(total: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the positive and of the negative entries of each column, in float64."""
    # Where all signs are equal, total and magnitude agree bit by bit: the other sum is exactly 0.
    positive = magnitudes.sum(0, dtype=torch.float64).add_(total).mul_(0.5)
    return positive, total - positive
