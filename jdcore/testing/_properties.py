"""The mathematical properties a spec declares, over all families of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from jdcore.errors import NonDifferentiableError
from jdcore.spec import Property
from jdcore.testing._case import Case, demand, demand_close

# Rows that agree up to 1e-4 leave half of the digits of float64 in their cosines.
_TOLERANCE = {"neardup": 1e-6}
_DEFAULT_TOLERANCE = 1e-9


def _tolerance(label: str) -> float:
    return _TOLERANCE.get(label.partition(" ")[0], _DEFAULT_TOLERANCE)


def never_conflicts(case: Case) -> None:
    for label, matrix in case.matrices():
        vector = case.call(case.make(len(matrix)), matrix)
        norms = matrix.norm(dim=1)
        # Against the size of the terms that are summed, which is what rounding is relative to.
        scale = norms * norms.max() * len(matrix)
        worst = float(((matrix @ vector) / scale.clamp(min=1e-300)).min())
        demand(worst >= -1e-3 * _tolerance(label), f"conflict of {worst:.1e} on {label}")


def is_linear_under_scaling(case: Case) -> None:
    for label, matrix in case.matrices():
        generator = torch.Generator().manual_seed(1)
        one, two = torch.rand(2, len(matrix), 1, generator=generator, device="cpu").double() + 0.1
        parts = [case.call(case.make(len(matrix)), c * matrix) for c in (one, two)]
        whole = case.call(case.make(len(matrix)), (one + two) * matrix)
        demand_close(parts[0] + parts[1], whole, _relaxed(label, whole, matrix), f"sum on {label}")
        scaled = case.call(case.make(len(matrix)), 3.0 * one * matrix)
        demand_close(
            scaled, 3.0 * parts[0], _relaxed(label, scaled, matrix), f"multiple on {label}"
        )


def _relaxed(label: str, vector: Tensor, matrix: Tensor) -> float:
    """Tolerance relative to the result, when errors are relative to the rows."""
    size = float(vector.abs().max())
    return _tolerance(label) * float(matrix.abs().max()) / size if size else 0.0


def is_permutation_invariant(case: Case) -> None:
    for label, matrix in case.matrices():
        generator = torch.Generator().manual_seed(2)
        # Columns keep their places: only rows change theirs.
        order = torch.randperm(len(matrix), generator=generator, device="cpu")
        expected = case.call(case.make(len(matrix)), matrix)
        permuted = case.call(case.make(len(matrix)), matrix[order])
        demand_close(permuted, expected, _relaxed(label, expected, matrix), f"order on {label}")


def is_scale_equivariant(case: Case) -> None:
    matrix = case.gauss().float()
    expected = case.call(case.make(case.rows), matrix.double())
    # Squares of such entries leave the range of float32, those below that of float64.
    for scale in (1e-30, 1e-15, 1e15, 1e30):
        vector = case.call(case.make(case.rows), matrix * scale).double() / scale
        demand_close(vector, expected, 1e-6, f"float32 at scale {scale:.0e}")
    # The squares of these leave the range of float64.
    for scale in (1e-200, 1e200):
        vector = case.call(case.make(case.rows), matrix.double() * scale) / scale
        demand_close(vector, expected, 1e-9, f"float64 at scale {scale:.0e}")


def stops_only_where_strongly_stationary(case: Case) -> None:
    # Rows of the other families may be strongly stationary, where zero is the right answer.
    for label, matrix in case.matrices("gauss", "conflict"):
        vector = case.call(case.make(len(matrix)), matrix)
        _demand_movement(vector, matrix, label)
    m = case.rows
    # Two opposite rows and others orthogonal to them: stationary for the two, not for all.
    matrix = torch.eye(m, m + 1, device="cpu").double()
    matrix[1] = -matrix[0]
    _demand_movement(case.call(case.make(m), matrix), matrix, "weakly stationary rows")


def _demand_movement(vector: Tensor, matrix: Tensor, label: str) -> None:
    size = float(vector.norm() / matrix.norm(dim=1).min())
    demand(size > 1e-6, f"the update is {size:.1e} of the shortest row on {label}")


def withstands_an_adversary(case: Case) -> None:
    m = max(5, case.spec.min_rows)
    honest = 3.0 + case.gauss(m - 1)
    mean = honest.mean(0)
    radius = (honest - mean).norm(dim=1).max()
    # Beyond some size an adversary is easily told; near the honest rows it is not.
    for size in (1e1, 1e4, 1e10, 1e20):
        for direction in (-mean, case.gauss(1, seed=1)[0]):
            # Towards the opposite of the honest rows, and anywhere.
            matrix = torch.cat([honest, size * direction[None]])
            distance = float((case.call(case.make(m), matrix) - mean).norm() / radius)
            demand(distance <= 2.0, f"an adversary at {size:.0e} moves it by {distance:.1f} radii")


def differentiates_as_declared(case: Case) -> None:
    matrix = case.gauss().requires_grad_()
    inputs = case.inputs(matrix)
    vector = case.make(case.rows)(matrix, **inputs)
    if case.declares(Property.DIFFERENTIABLE):
        case_of = lambda jacobian: case.make(case.rows)(jacobian, **inputs)  # noqa: E731
        demand(torch.autograd.gradcheck(case_of, (matrix,)), "the derivative is wrong")
        return
    try:
        vector.sum().backward()
    except NonDifferentiableError:
        return
    demand(
        False,
        "differentiating should raise NonDifferentiableError, or the spec declare DIFFERENTIABLE",
    )
