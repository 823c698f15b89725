"""What solvers do where an answer is not as exact as it should be."""

from __future__ import annotations

from jdcore.aggregation import report_residual
from jdcore.errors import UnsolvedWarning, warn

UNSOLVED = 1e-10
"""Relative residual that is worth a warning."""


def warn_if_unsolved(problem: str, residual: float, limit: float = UNSOLVED) -> None:
    """Report a residual; emit an :class:`~jdcore.errors.UnsolvedWarning` above the limit."""
    report_residual(lambda: residual)
    if not residual <= limit:
        warn(UnsolvedWarning(problem, residual))
