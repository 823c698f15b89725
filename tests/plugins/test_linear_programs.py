"""Linear programs of the standard methods beside scipy, which their own tests do without."""

import numpy as np
import pytest

from jdplugins.standard._linear_program import maximize_on_simplex


@pytest.mark.parametrize("seed", range(20))
def test_linear_programs_have_the_optimum_that_another_solver_finds(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    m, k = int(rng.integers(1, 8)), int(rng.integers(0, 8))
    rows = rng.standard_normal((k, m))
    inside = rng.dirichlet(np.ones(m))
    bounds = rows @ inside - rng.random(k) * rng.integers(0, 2, k)
    objective = rng.standard_normal(m)

    weights = maximize_on_simplex(objective, rows, bounds)

    conditions = {"A_ub": -rows, "b_ub": -bounds} if k else {}
    found = optimize.linprog(-objective, **conditions, A_eq=np.ones((1, m)), b_eq=[1.0])
    assert weights.min() >= 0.0
    assert (rows @ weights - bounds).min(initial=0.0) >= -1e-9
    assert objective @ weights == pytest.approx(-found.fun, abs=1e-9)
