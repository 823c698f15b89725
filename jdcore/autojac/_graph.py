from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jdcore.autojac.transform import Diagonalize, Init, Transform


def rows_of(outputs: Sequence[Tensor], initial: Sequence[Tensor] | None) -> Transform:
    """Start a Jacobian: from initial Jacobians, or with one row per element of the outputs."""
    if initial is None:
        return Init(outputs) >> Diagonalize(outputs)
    return Init(outputs, initial)
