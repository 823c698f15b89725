"""Whatever becomes of the samples: the Gramian is right, or it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jdcore import JDCoreError
from jdcore.autogram import Engine
from tests.zoo.programs import APART, MIXING, MOVING, Operation, Program, parameters_of, program
from tests.zoo.specimen import as_matrix, cleared, gathered, rows_of, weights_for

TOLERANCE = 1e-9


class _Holder(nn.Module):
    """Makes an engine of loose parameters."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters)


def _near(got: Tensor, rows: Tensor) -> bool:
    """Each entry, measured by the lengths of its two rows: no outlier hides the others."""
    # What a saturated softmax leaves of a gradient of order 1 is rounding.
    lengths = rows.norm(dim=1).clamp(min=1e-6)
    slack = TOLERANCE * lengths[:, None] * lengths[None]
    return bool(((got - rows @ rows.T).abs() <= slack).all())


def _outcome(run: Program, engine: Engine, parameters: list[Tensor], data: int) -> str:
    """``right``, ``wrong`` or ``refused``; both entry points have to agree."""
    losses = run.run(parameters, data)
    rows = rows_of(losses, parameters)
    try:
        gramian = engine.compute_gramian(losses)
    except JDCoreError:
        gramian = None
    seen: list[Tensor] = []
    weights = weights_for(losses)
    try:
        engine.backward(run.run(parameters, data), lambda g: (seen.append(g), weights)[1])
    except JDCoreError:
        assert gathered(parameters).count_nonzero() == 0, "refused after .grad was written"
        return "refused" if gramian is None else "wrong: only backward refuses"
    update = gathered(parameters)
    cleared(parameters)
    if gramian is None:
        return "wrong: only compute_gramian refuses"
    if not all(_near(as_matrix(g, losses.ndim), rows) for g in (gramian, *seen)):
        return "wrong Gramian"
    scale = (weights.reshape(-1).abs()[:, None] * rows.abs()).sum()
    good = (update - weights.reshape(-1) @ rows).abs().max() <= TOLERANCE * scale
    return "right" if good else "wrong gradient"


def _complaint(run: Program, seed: int) -> str | None:
    parameters = parameters_of(seed)
    holder = _Holder(parameters)
    parameters = list(holder.all)
    with_samples, without = Engine(holder, batch_dim=0), Engine(holder, batch_dim=None)
    # The same operations on other indices: nothing may be remembered that depends on them.
    for data in (0, 1, 2):
        outcome = _outcome(run, with_samples, parameters, data)
        allowed = ("right",) if run.apart else ("right", "refused")
        if outcome not in allowed:
            return f"samples, data {data}: {outcome}"
    outcome = _outcome(run, without, parameters, 3)
    return None if outcome == "right" else f"tasks: {outcome}"


def _complaints(first: int, last: int) -> list[str]:
    found = {seed: _complaint(program(seed), seed) for seed in range(first, last)}
    return [f"program({seed}): {complaint}" for seed, complaint in found.items() if complaint]


def test_random_programs_are_right_or_refused() -> None:
    assert _complaints(0, 200) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_random_programs_are_right_or_refused(part: int) -> None:
    assert _complaints(1000 * (part + 1), 1000 * (part + 1) + 200) == []


ALL = [*enumerate([*APART, *MOVING, *MIXING])]


@pytest.mark.parametrize("b", [1, 2, 3, 5, 8])
def test_each_operation_by_itself(b: int) -> None:
    """After a layer and before another, so that its samples matter on both sides."""

    def between(operation: Operation) -> Program:
        around: list[Operation] = [APART[1], APART[4], operation, APART[1], APART[4]]
        return Program(around, b, False, False, forgets=True, seed=b)

    found = {number: _complaint(between(operation), b) for number, operation in ALL}
    assert {number: complaint for number, complaint in found.items() if complaint} == {}


def test_mixing_is_found_in_all_places_of_a_batch() -> None:
    """Loss i reaches sample j, for each pair: no numbering of samples has a blind spot."""
    layer = nn.Linear(2, 1, bias=False).double()
    engine = Engine(layer, batch_dim=0)
    generator = torch.Generator().manual_seed(0)
    for b in (2, 3, 4, 7, 8, 16):
        x = torch.randn(b, 2, dtype=torch.float64, generator=generator)
        for i in range(b):
            for j in range(b):
                hidden = layer(x)[:, 0]
                losses = hidden.clone()
                losses[i] = hidden[i] - 0.5 * hidden[j]
                rows = rows_of(losses, list(layer.parameters()))
                try:
                    gramian = engine.compute_gramian(losses)
                except JDCoreError:
                    assert i != j, "no sample is mixed with another"
                else:
                    assert torch.allclose(gramian, rows @ rows.T, atol=1e-12), (b, i, j)
