"""Published experiments: their constants are right, and the command runs them all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jdcore import get_aggregator
from jdcore.cli import main

for library in ("matplotlib", "rich", "sklearn", "scipy"):
    pytest.importorskip(library)

from jdcore.bench import burgers, digits, quadratics, toy  # noqa: E402 - where they are installed
from jdcore.bench.command import EXPERIMENTS  # noqa: E402 - as above
from jdcore.bench.outcome import Settings, paired, spread  # noqa: E402 - as above
from jdcore.bench.qm9 import coulomb_matrix  # noqa: E402 - as above
from jdcore.bench.report import EXPERIMENTS as RUNNABLE  # noqa: E402 - as above


def toy_losses(x: Tensor) -> Tensor:
    """The formulas of the module's first page in torch."""
    x1, x2 = x
    t = torch.tanh(x2)
    f1 = torch.log((0.5 * (-x1 - 7) + t).abs().clamp_min(5e-6)) + 6
    f2 = torch.log((0.5 * (-x1 + 3) - t + 2).abs().clamp_min(5e-6)) + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    # One start is at x2 = 0, where versions of torch differ in what clamp_min has as derivative.
    c1, c2 = (torch.where(c >= 0, c, 0.0) for c in (torch.tanh(x2 / 2), torch.tanh(-x2 / 2)))
    return torch.stack([0.1 * (f1 * c1 + g1 * c2), f2 * c1 + g2 * c2])


@pytest.mark.parametrize("start", toy.STARTS)
def test_losses_and_gradients_of_the_toy_problem(start: tuple[float, float]) -> None:
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    expected = toy_losses(x)
    rows = torch.autograd.functional.jacobian(toy_losses, x.detach())

    losses, gradients = toy.evaluate(*start)

    assert losses == pytest.approx(expected.tolist())
    np.testing.assert_allclose(gradients, rows.numpy(), rtol=1e-12, atol=1e-12)


def test_the_front_of_the_toy_problem_is_stationary() -> None:
    """At x1 = 0 both quadratics weigh the same, and x2 = -8.3552 as the papers say."""
    [middle] = toy.front(3)[1:2]
    losses, rows = toy.evaluate(0.0, -8.3552)

    assert middle == pytest.approx(losses, abs=1e-5)
    balanced = np.array(rows[0]) / toy.SCALE + np.array(rows[1])
    assert np.abs(balanced).max() < 1e-4


def test_adam_on_the_mean_is_that_of_torch() -> None:
    x = torch.nn.Parameter(torch.tensor(toy.STARTS[4], dtype=torch.float64))
    optimizer = torch.optim.Adam([x], lr=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        toy_losses(x).mean().backward()
        optimizer.step()

    descent = toy.descend(get_aggregator("mean"), toy.STARTS[4], 100, toy.front(3))

    assert descent.losses[-1] == pytest.approx(toy_losses(x).tolist(), rel=1e-9)


def test_the_gradients_of_the_quadratics() -> None:
    for problem in quadratics.problems():
        x = torch.tensor([0.3, -2.0], dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(problem.losses, x)
        torch.testing.assert_close(problem.jacobian(x), expected)


def test_some_combination_of_the_gradients_vanishes_on_the_pareto_set() -> None:
    problem = quadratics.problems()[1]
    for x in problem.pareto_set(7):
        first, second = problem.jacobian(x)
        cross = first[0] * second[1] - first[1] * second[0]
        assert abs(float(cross)) < 1e-6
        assert float(first @ second) <= 1e-6


@pytest.mark.parametrize(
    ("method", "largest_gap", "precision", "conflicts"),
    [("upgrad", 0.004, 1e-3, 0.0), ("mean", 0.056, 1e-3, 0.41), ("mgda", 0.24, 1e-2, 0.0)],
)
def test_where_methods_end_on_the_convex_quadratics(
    method: str, largest_gap: float, precision: float, conflicts: float
) -> None:
    """Figures of an implementation that shares nothing with this one."""
    problem = quadratics.problems()[1]
    aggregator = get_aggregator(method)

    runs = [quadratics.descend(aggregator, problem, s, problem.rate) for s in problem.starts]

    assert max(run.gap for run in runs) == pytest.approx(largest_gap, abs=precision)
    assert np.mean([run.conflicts for run in runs]) == pytest.approx(conflicts, abs=6e-3)


def test_the_exact_solution_solves_burgers_equation() -> None:
    """Central differences away from the steep middle leave an error of their own step."""
    x, t, step = np.linspace(0.3, 0.9, 7), np.full(7, 0.4), 1e-4
    u = burgers.exact(x, t)
    u_t = (burgers.exact(x, t + step) - burgers.exact(x, t - step)) / (2 * step)
    right, left = burgers.exact(x + step, t), burgers.exact(x - step, t)
    u_x, u_xx = (right - left) / (2 * step), (right - 2 * u + left) / step**2

    np.testing.assert_allclose(u_t + u * u_x, burgers.VISCOSITY * u_xx, atol=1e-5)
    np.testing.assert_allclose(burgers.exact(x, 0 * t), -np.sin(np.pi * x), atol=1e-12)


def test_the_residual_of_a_known_function() -> None:
    """For u = x t it is x + x t², since u_t = x, u_x = t and u_xx = 0."""
    x = torch.tensor([0.5, -0.2], requires_grad=True)
    t = torch.tensor([0.1, 0.9], requires_grad=True)

    left = burgers.residual(lambda x, t: x * t + 0 * x**3, x, t)

    torch.testing.assert_close(left, x + x * t * t)


def test_a_coulomb_matrix_by_hand() -> None:
    matrix = coulomb_matrix([8, 1], np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))

    np.testing.assert_allclose(matrix, [[0.5 * 8**2.4, 4.0], [4.0, 0.5]])


def test_every_method_gets_the_rate_that_is_best_for_it() -> None:
    trained: list[tuple[str, int, float]] = []

    def trainer(name: str, seed: int, rate: float, epochs: int) -> digits.Result:
        trained.append((name, seed, rate))
        loss = abs(rate - {"mean": 0.1, "upgrad": 0.2}[name]) if rate < 0.3 else math.nan
        return digits.Result(loss, 0.5)

    plan = digits.Plan(rates=(0.1, 0.2, 0.3), tuning_seeds=(9,), seeds=(0, 1), epochs=1)
    steps: list[None] = []
    found = digits.compare(trainer, ["mean", "upgrad"], plan, lambda: steps.append(None))

    assert {name: c.rate for name, c in found.items()} == {"mean": 0.1, "upgrad": 0.2}
    assert [seed for _, seed, _ in trained if seed != 9] == [0, 1, 0, 1]
    assert len(steps) == 2 * plan.trainings


def test_a_spread_needs_two_values() -> None:
    assert (spread([1.0]), spread([1.0, 3.0], 1)) == ("1.000", "2.0 ± 1.4")
    assert (paired([1.0]), paired([1.0, 3.0], 1)) == ("1.000", "2.0 ± 1.0")
    assert spread([math.nan]) == "diverged"


Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["bench", "--out", str(tmp_path), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_command_knows_all_experiments() -> None:
    assert list(RUNNABLE) == list(EXPERIMENTS)


def test_all_experiments_run_quickly(bench: Bench, tmp_path: Path) -> None:
    code, output, errors = bench("--quick", "--methods", "mean", "upgrad")

    assert (code, errors) == (0, "")
    for name in ("toy", "quadratics", "burgers", "overlaid", "single"):
        data = json.loads((tmp_path / f"{name}.json").read_text())
        assert [row[0] for row in data["tables"][0]["rows"]] == ["Mean", "UPGrad"]
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.json" in output.replace("\n", "")


def test_the_progress_adds_up() -> None:
    settings = Settings(methods=("mean", "random"), seeds=2, quick=True)
    for name in ("toy", "quadratics"):
        steps: list[None] = []
        RUNNABLE[name].run(settings, lambda steps=steps: steps.append(None))  # type: ignore[misc]
        assert len(steps) == RUNNABLE[name].work(settings)


def test_methods_that_an_experiment_cannot_use_are_left_out_with_the_reason(
    bench: Bench, tmp_path: Path
) -> None:
    code, output, _ = bench("quadratics", "--methods", "mean", "krum", "--quick")

    assert code == 0
    assert "quadratics: without krum." in output
    table = json.loads((tmp_path / "quadratics.json").read_text())["tables"][0]
    assert [row[0] for row in table["rows"]] == ["Mean"]


def test_methods_that_look_at_losses_or_two_batches_take_part_unless_they_refuse() -> None:
    names = ("modo", "excess_mtl", "db_mtl")  # the last one takes logarithms, and a loss is zero
    settings = Settings(methods=names, seeds=1, quick=True)

    table = RUNNABLE["quadratics"].run(settings, lambda: None).tables[0]

    assert [row[0] for row in table.rows] == ["MoDo", "ExcessMTL"]
    assert "Without DBMTL: Parameter `losses` must be positive" in table.note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "`NAME` must be one of toy"),
        (["toy", "--methods", "krum"], "`--methods` must be methods that an experiment can use"),
        (["--methods", "nothing"], "No aggregator is registered"),
        (["--seeds", "0"], "must be a whole number >= 1"),
    ],
)
def test_unusable_arguments_are_refused_at_once(
    bench: Bench, arguments: list[str], message: str
) -> None:
    code, _, errors = bench(*arguments)

    assert code == 2
    assert message in errors
