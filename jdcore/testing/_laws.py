"""The laws of :class:`jdcore.Aggregator` and :class:`jdcore.Weighting`, for every method."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from jdcore.aggregation import as_module
from jdcore.errors import NonFiniteError
from jdcore.protocols import BlockwiseAggregator
from jdcore.testing._case import (
    Case,
    accelerator,
    demand,
    demand_close,
    demand_refusal,
    quietly,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def keeps_dtype_and_shape(case: Case) -> None:
    for dtype in DTYPES:
        matrix = case.gauss().to(dtype)
        vector = case.call(case.make(case.rows), matrix)
        demand(vector.dtype == dtype, f"{dtype} in, {vector.dtype} out")
        demand(vector.shape == matrix.shape[1:], f"shape {vector.shape} for {matrix.shape}")
        demand(bool(torch.isfinite(vector).all()), f"not finite in {dtype}")


def agrees_between_dtypes(case: Case) -> None:
    for dtype in DTYPES[:3]:
        matrix = case.gauss().to(dtype)
        narrow = case.call(case.make(case.rows), matrix)
        wide = case.call(case.make(case.rows), matrix.double())
        # The input is the same, so that only the rounding of the result is left.
        tolerance = 8 * torch.finfo(dtype).eps
        demand_close(
            narrow, wide.to(dtype), tolerance, f"{dtype} against float64 of the same input"
        )


def works_on_accelerators(case: Case) -> None:
    matrix = case.gauss().float()
    # On the CPU first, so that a method that is broken anyway does not look like one of the device.
    expected = case.call(case.make(case.rows), matrix)
    # By `as_module`, as vectors among the arguments have to move along, too.
    device = accelerator()
    vector = case.call(as_module(case.make(case.rows)).to(device), matrix.to(device))
    demand(vector.device.type == device, f"{device} in, {vector.device} out")
    if not case.spec.stochastic:
        demand_close(vector.cpu(), expected, 1e-4, f"{device} against the CPU")


def leaves_its_input_alone(case: Case) -> None:
    matrix = case.gauss()
    copy = matrix.clone()
    case.call(case.make(case.rows), matrix)
    demand(torch.equal(matrix, copy), "the matrix was modified")


def handles_no_rows(case: Case) -> None:
    # No task may be present in a batch: the step is then zero, and training goes on.
    vector = case.call(case.make(0), torch.zeros(0, 3, device="cpu"))
    demand(torch.equal(vector, torch.zeros(3, device="cpu")), f"{vector} for a matrix without rows")


def handles_no_columns(case: Case) -> None:
    # Where all shared parameters are frozen, nothing is left to aggregate.
    vector = case.call(case.make(case.rows), torch.zeros(case.rows, 0, device="cpu"))
    demand(vector.shape == (0,), f"{vector} for a matrix without columns")


def handles_degenerate_rows(case: Case) -> None:
    # All of these occur in training: shared labels, ReLUs that are dead, losses that vanish.
    matrix = case.gauss()
    duplicate, opposite, one_zero = matrix.clone(), matrix.clone(), matrix.clone()
    duplicate[1] = matrix[0]
    opposite[1] = -matrix[0]
    one_zero[1] = 0.0
    degenerate = {
        "duplicate rows": duplicate,
        "opposite rows": opposite,
        "a zero row": one_zero,
        "equal rows": matrix[:1].expand_as(matrix),
        "a single column": matrix[:, :1],
    }
    for label, example in degenerate.items():
        vector = case.call(case.make(case.rows), example)
        demand(bool(torch.isfinite(vector).all()), f"{vector} for {label}")
    # At a stationary point of all objectives no update may be made up.
    zero = case.call(case.make(case.rows), torch.zeros_like(matrix))
    demand(not zero.any(), f"{zero} for the zero matrix")


def handles_one_row(case: Case) -> None:
    vector = case.call(case.make(1), case.gauss(1))
    demand(bool(torch.isfinite(vector).all()), f"{vector} for a single row")


def refuses_too_few_rows(case: Case) -> None:
    # Not zero rows, which all methods take.
    for m in range(1, case.spec.min_rows):
        matrix = case.gauss(m)
        call = partial(case.make(case.rows), matrix, **case.inputs(matrix))
        demand_refusal(call, f"{m} rows, fewer than min_rows")


def refuses_malformed_matrices(case: Case) -> None:
    matrix = case.gauss()
    inputs = case.inputs(matrix)
    malformed = {
        "a vector": matrix[0],
        "a three-dimensional tensor": matrix[None],
        # torch would promote these in silence, and the update would be of another dtype.
        "an integer matrix": matrix.long(),
        "a complex matrix": matrix.to(torch.complex64),
        "a list": matrix.tolist(),
    }
    for label, example in malformed.items():
        demand_refusal(partial(case.make(case.rows), example, **inputs), label)


def is_refused_without_what_it_needs(case: Case) -> None:
    """Losses or a second batch, where the spec says that the method looks at them."""
    matrix = case.gauss()
    inputs = case.inputs(matrix)
    # One at a time, as the error has to name what is missing.
    for name in inputs:
        known = {key: value for key, value in inputs.items() if key != name}
        call = partial(case.make(case.rows), matrix, **known)
        error = demand_refusal(call, f"a call without {name}")
        demand(error.parameter == name, f"without {name}, {error.parameter!r} is named")
        demand(bool(error.hint), f"the error does not say how to give {name}")


def checks_the_losses(case: Case) -> None:
    matrix = case.gauss()
    inputs = case.inputs(matrix)
    losses = inputs.pop("losses")
    for label, wrong in {"too few": losses[1:], "a list": losses.tolist()}.items():
        call = partial(case.make(case.rows), matrix, losses=wrong, **inputs)
        error = demand_refusal(call, f"{label} as losses")
        demand(error.parameter == "losses", f"{error.parameter!r} is named for {label}")
    # NaN in the losses alone: the Gramian of such a step may still be finite.
    broken = losses.clone()
    broken[1] = float("nan")
    vector = quietly(lambda: case.make(case.rows)(matrix, losses=broken, **inputs))
    demand(bool(vector.isnan().all()), f"{vector} where a loss is NaN")
    try:
        case.make(case.rows, {"check_finite": True})(matrix, losses=broken, **inputs)
    except NonFiniteError as error:
        demand(error.rows == (1,), f"loss 1 is NaN, but {error.rows} are named")
        return
    demand(False, "check_finite=True should raise a NonFiniteError where a loss is NaN")


def gives_nan_for_nonfinite_input(case: Case) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        matrix = _with_entry(case, value)
        vector = case.call(case.make(case.rows), matrix)
        demand(bool(vector.isnan().all()), f"{vector} for a matrix with {value}")


def raises_for_nonfinite_input_when_asked(case: Case) -> None:
    matrix = _with_entry(case, float("nan"))
    try:
        case.make(case.rows, {"check_finite": True})(matrix, **case.inputs(matrix))
    except NonFiniteError as error:
        demand(error.rows == (1,), f"row 1 holds the NaN, but {error.rows} are named")
        return
    demand(False, "check_finite=True should raise a NonFiniteError")


def _with_entry(case: Case, value: float) -> Tensor:
    matrix = case.gauss()
    # Not in the first row, which methods may treat in a way of its own.
    matrix[1, 2] = value
    return matrix


def is_deterministic(case: Case) -> None:
    matrix = case.gauss().float()
    # In float32, where sums in another order show at once.
    first, second = (case.call(case.make(case.rows, seed=3), matrix) for _ in range(2))
    demand(torch.equal(first, second), "the same input and generator gave different bits")


def gives_the_same_by_blocks(case: Case) -> None:
    whole = case.make(case.rows)
    demand(isinstance(whole, BlockwiseAggregator), "there is no aggregate_blocks method")
    # Those of the Gramian draw for rows, which are the same however columns are divided.
    if case.spec.input == "matrix" and case.spec.stochastic:
        return  # the order in which blocks draw random numbers is not promised
    matrix = case.gauss()
    # What the blocks hold, of which the second is float32.
    rounded = torch.cat([matrix[:, :7], matrix[:, 7:].float().double()], dim=1)
    inputs = case.inputs(rounded)
    if "second" in inputs:
        inputs["second"] = list(inputs["second"].split([7, matrix.shape[1] - 7], dim=1))
    vectors, weights = case.make(case.rows).aggregate_blocks(
        [matrix[:, :7], matrix[:, 7:].float()], **inputs
    )
    expected = case.call(whole, rounded)
    demand_close(torch.cat(vectors), expected, 1e-6, "blocks against the whole matrix")
    demand(vectors[1].dtype == torch.float32, "a block lost its dtype")
    if weights is None:
        demand(case.spec.input == "matrix", "there are no weights")
    else:
        demand_close(weights.double() @ rounded, expected, 1e-6, "weights @ J against the update")


def weighting_agrees_with_aggregator(case: Case) -> None:
    matrix = case.gauss()
    weights = case.weigh(case.make_weighting(case.rows), matrix)
    expected = case.call(case.make(case.rows), matrix)
    demand_close(weights @ matrix, expected, 1e-12, "weights @ J against the aggregator")


def weighting_keeps_its_laws(case: Case) -> None:
    matrix = case.gauss()
    for dtype in DTYPES:
        weights = case.weigh(case.make_weighting(case.rows), matrix, dtype)
        demand(weights.dtype == dtype, f"{dtype} in, {weights.dtype} out")
        demand(weights.shape == (case.rows,), f"weights of shape {weights.shape}")
    inputs = case.inputs(matrix)
    gramian = matrix @ inputs.pop("second", matrix).T
    # Weightings are given the Gramian that others look at later, a record for one.
    copy = gramian.clone()
    quietly(lambda: case.make_weighting(case.rows)(gramian, **inputs))
    demand(torch.equal(gramian, copy), "the Gramian was modified")
    empty = case.weigh(case.make_weighting(0), torch.zeros(0, 3, device="cpu"))
    demand(empty.shape == (0,), f"{empty} for an empty Gramian")
    # A weighting in the place of its aggregator is the commonest mistake: it gets a Jacobian.
    call = partial(case.make_weighting(case.rows), matrix, **inputs)
    demand_refusal(call, "a Gramian that is not square")
