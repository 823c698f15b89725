from __future__ import annotations

from typing import Literal

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from jdcore.aggregation import GramianSource, RowMixing, row_lengths
from jdcore.errors import ParameterError
from jdcore.validators import one_of


@define(eq=False)
class RowNormalized(RowMixing):
    """
    Another method on rows that are divided by their norms, their losses, or both.

    The choices of `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/pdf/1810.04650>`_, made for :class:`MGDA <jdcore.aggregation.MGDA>`, whose
    update the shortest row dominates; they work with any method.

    Methods that look at the Gramian only have a ``weighting`` as before. Zero rows stay zero, and
    rows whose length has no inverse in float64 (below 6e-309) stay as they are.

    :param aggregator: The wrapped :class:`~jdcore.Aggregator`.
    :param by: ``"l2"``: each row is divided by its norm. ``"loss"``: by the value of its objective,
        which makes rows of the logarithms. ``"loss+"``: by both. ``"none"``: by nothing. The second
        and the third need positive losses, ``jac_to_grad(..., losses=losses)``.
    :raises ParameterError: At a call, if losses are needed and missing, or not positive.

    >>> import torch
    >>> from jdcore.aggregation import MGDA, RowNormalized
    >>> RowNormalized(MGDA())(torch.tensor([[8.0, 0.0], [0.0, 2.0]]))
    tensor([0.5000, 0.5000])
    """

    by: Literal["none", "l2", "loss", "loss+"] = field(
        default="l2", validator=one_of("none", "l2", "loss", "loss+")
    )

    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        by_loss = self.by in ("loss", "loss+")
        factors = _inverse_losses(source) if by_loss else np.ones(source.rows)
        if self.by in ("l2", "loss+"):
            with np.errstate(over="ignore", divide="ignore"):
                normalizing = factors / row_lengths(source)
            # A zero row has no direction, and infinite factors make NaN of it.
            factors = np.where(np.isfinite(normalizing), normalizing, factors)
        return np.diag(factors)


@np.errstate(over="ignore", divide="ignore")
def _inverse_losses(source: GramianSource) -> NDArray[np.float64]:
    losses: NDArray[np.float64] = source.known_losses().double().cpu().numpy()
    inverses: NDArray[np.float64] = 1.0 / losses
    if not ((losses > 0.0) & np.isfinite(inverses)).all():
        raise ParameterError("losses", "positive: rows are divided by them", losses.tolist())
    return inverses
