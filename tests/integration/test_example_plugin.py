"""The example distribution, installed for real: its own tests, its docstring, its README."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.environments import clean_environment, make_environment

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-plugin"

pytestmark = [pytest.mark.slow, pytest.mark.artefacts]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("example") / "venv", EXAMPLE)


def run(python: Path, *arguments: str) -> str:
    done = subprocess.run(
        [python, *arguments],
        env=clean_environment(),
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass(python: Path) -> None:
    printed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")

    assert " passed" in printed


def test_the_example_in_its_docstring_is_true(python: Path) -> None:
    code = (
        "import doctest, auxiliary_losses.gradient_similarity as module; "
        "print(doctest.testmod(module))"
    )

    assert run(python, "-c", code) == "TestResults(failed=0, attempted=3)\n"


def test_the_readme_is_true(python: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    setting = """
import torch
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
main_loss, auxiliary_loss = model(torch.ones(3)).square()
before = model.weight.clone()
"""

    assert run(
        python, "-c", f"{setting}{example}\nprint((model.weight != before).any().item())"
    ) == ("True\n")
