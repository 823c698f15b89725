from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from jdcore import describe, get_aggregator, list_plugins
from jdcore.cli import main
from jdcore.demo.data import HEIGHT, WIDTH, draw_pairs, overlaid_digits, overlay
from jdcore.demo.experiment import compare
from jdcore.demo.model import TwoDigitReader
from jdcore.demo.report import progress_bar
from jdcore.demo.training import BATCH_SIZE, compare_gradients, train

# Of the installed plugins only: other tests register methods of their own.
METHODS = [spec.name for plugin in list_plugins() for spec in plugin.aggregators]


Demo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps per epoch."""
    monkeypatch.setattr("jdcore.demo.data.TRAIN_PAIRS", 10 * BATCH_SIZE)
    monkeypatch.setattr("jdcore.demo.data.TEST_PAIRS", 100)


@pytest.fixture
def demo(little_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Demo:
    """Run the command on little data; return its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["demo", "--epochs", "1", "--out", str(tmp_path / "out"), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figure out, which takes most of the time of a short run."""
    monkeypatch.setattr("jdcore.demo.experiment.draw", lambda *_: None)


def rows_of(output: str) -> dict[str, list[str]]:
    """The cells of the table by the name of the method."""
    lines = [line.split() for line in output.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 6 and line[-1].endswith("%")}


def test_the_demo_prints_a_table_with_both_methods(demo: Demo) -> None:
    code, output, errors = demo()
    rows = rows_of(output)

    assert (code, errors) == (0, "")
    assert list(rows) == ["Mean", "UPGrad"]
    for left_accuracy, right_accuracy, left_loss, right_loss, share in rows.values():
        for percentage in (left_accuracy, right_accuracy, share):
            assert 0.0 <= float(percentage.removesuffix("%")) <= 100.0
        assert 0.0 < float(left_loss) < 10.0
        assert 0.0 < float(right_loss) < 10.0


@pytest.mark.usefixtures("no_figure")
def test_upgrad_conflicts_in_no_step_and_the_mean_in_some(demo: Demo) -> None:
    rows = rows_of(demo("--epochs", "30")[1])

    assert rows["UPGrad"][-1] == "0.0%"
    assert float(rows["Mean"][-1].removesuffix("%")) > 0.0


def test_the_demo_writes_a_figure_that_shows_something(demo: Demo, tmp_path: Path) -> None:
    output = demo()[1]
    path = tmp_path / "out" / "demo.png"
    pixels = imread(path)[:, :, :3]
    colours = np.unique((pixels.reshape(-1, 3) * 255).astype(int), axis=0)

    assert f"Figure: {path}" in output
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 500
    assert len(colours) > 50
    # The curves of the left task, the right task and the cosine.
    for colour in [(31, 119, 180), (255, 127, 14), (44, 160, 44)]:
        assert (colours == colour).all(axis=1).any()


@pytest.mark.usefixtures("no_figure")
def test_the_same_seed_gives_the_same_output_and_another_seed_another(demo: Demo) -> None:
    first, second, other = demo()[1], demo()[1], demo("--seed", "1")[1]

    assert first == second
    assert first != other


@pytest.mark.usefixtures("no_figure")
def test_the_demo_leaves_the_random_state_and_the_threads_as_they_were(demo: Demo) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        demo("--aggregator", "random")

        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_trains_or_is_refused_in_one_line(name: str, demo: Demo) -> None:
    code, output, errors = demo("--aggregator", name)

    if describe(name).min_rows > 2 or describe(name).cross_gramian:
        assert code == 2
        assert errors.count("\n") == 1
        assert "must be a method for 2 objectives" in errors
    else:
        assert (code, errors) == (0, "")
        assert describe(name).class_name in rows_of(output)


@pytest.mark.parametrize("out", ["file", "file/inside"])
def test_a_folder_that_cannot_be_written_gives_one_line(
    out: str, demo: Demo, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, output, errors = demo("--out", str(tmp_path / out))

    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "`--out` must be a folder to write to" in errors


def test_bad_input_leaves_no_folder_behind(demo: Demo, tmp_path: Path) -> None:
    assert demo("--aggregator", "no-such")[0] == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "package"),
    [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich")],
)
def test_without_its_extra_the_demo_says_what_to_install(
    module: str, package: str, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, output, errors = demo()

    assert (code, output) == (2, "")
    assert errors == f"jdcore demo: Not installed: {package}. Run: pip install 'jdcore[demo]'\n"
    assert not (tmp_path / "out").exists()


def test_an_interruption_ends_the_demo_without_a_traceback(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jdcore.demo.experiment.compare", interrupt)

    assert demo() == (130, "", "")


def test_a_method_that_leaves_the_finite_numbers_is_stopped_and_named(
    little_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def fails_at_the_fourth_call(matrix: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return matrix[0] * (float("nan") if calls == 4 else 1.0)

    methods = [("Mean", get_aggregator("mean")), ("Failing", fails_at_the_fourth_call)]
    compare(methods, folder=tmp_path, epochs=1, seed=0)
    output = capsys.readouterr().out

    assert calls == 4
    assert "Failing was stopped at step 4" in output
    assert "nan" not in " ".join(rows_of(output)["Failing"])
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_vanishing_gradients_give_no_conflict_and_an_undefined_cosine() -> None:
    cosine, conflict = compare_gradients(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.ones(2))

    assert np.isnan(cosine)
    assert not conflict


def test_conflict_and_cosine_are_those_of_the_definition() -> None:
    # The rows have norms 1 and sqrt(5) and inner product -2; the mean is (-1/2, 1/2).
    jacobian = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])

    for update, expected in [((-0.5, 0.5), True), ((0.0, 1.0), False), ((-1e-7, 1.0), False)]:
        cosine, conflict = compare_gradients(jacobian, torch.tensor(update))

        assert cosine == pytest.approx(-2 / 5**0.5)
        assert conflict is expected


def test_training_with_the_mean_is_gradient_descent_on_each_head_and_the_mean_of_losses(
    little_data: None,
) -> None:
    digits = overlaid_digits(seed=3)
    run = train("", get_aggregator("mean"), digits, epochs=1, seed=3, advance=lambda: None)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = TwoDigitReader()
    order = torch.randperm(10 * BATCH_SIZE, generator=torch.Generator().manual_seed(3))
    for t, (step, batch) in enumerate(zip(run.steps, order.split(BATCH_SIZE), strict=True)):
        scores, labels = model(digits.train_images[batch]), digits.train_labels[batch]
        losses = [cross_entropy(scores[:, k], labels[:, k]) for k in range(2)]
        torch.testing.assert_close(torch.tensor(step.losses), torch.stack(losses).detach())
        model.zero_grad()
        sum(losses).backward()
        rate = 0.2 * (1 - 0.99 * t / 10)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                share = 0.5 if name.startswith("trunk") else 1.0
                parameter -= rate * share * parameter.grad


def test_training_and_test_pairs_share_no_scan() -> None:
    train_pairs, test_pairs = draw_pairs(1797, np.random.default_rng(0))

    assert set(train_pairs.flat).isdisjoint(test_pairs.flat)
    assert train_pairs.shape == (8000, 2)
    assert test_pairs.shape == (2000, 2)


def test_an_overlay_shows_the_stronger_ink_of_both_scans() -> None:
    scans = np.stack([np.full((8, 8), 0.25), np.full((8, 8), 0.75)]).astype(np.float32)
    [image] = overlay(scans, np.array([[0, 1]]))
    expected = np.zeros((HEIGHT, WIDTH))
    expected[:8, :8] = 0.25
    expected[2:, 4:] = 0.75

    np.testing.assert_array_equal(image, expected)


def test_images_show_the_digits_of_their_labels() -> None:
    # Of pairs of a digit with itself, a nearest-mean reader that knows only the labels should see
    # the left digit in the left half far more often than by chance.
    digits = overlaid_digits(seed=0)
    left = digits.train_images[:, :, :4].flatten(1), digits.test_images[:, :, :4].flatten(1)
    means = torch.stack([left[0][digits.train_labels[:, 0] == d].mean(0) for d in range(10)])
    read = torch.cdist(left[1], means).argmin(dim=1)

    assert (read == digits.test_labels[:, 0]).double().mean() > 0.5


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_shows_on_terminals_only(terminal: bool) -> None:
    written = io.StringIO()
    with progress_bar(Console(file=written, force_terminal=terminal, width=80)) as bar:
        bar.advance(bar.add_task("UPGrad", total=2), 2)

    assert ("UPGrad" in written.getvalue()) is terminal
    assert ("100%" in written.getvalue()) is terminal


@pytest.mark.slow
@pytest.mark.artefacts
def test_the_command_works_in_a_pipe(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("jdcore"), "demo", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "UPGrad" in done.stdout
    assert (tmp_path / "jdcore-demo" / "demo.png").exists()
