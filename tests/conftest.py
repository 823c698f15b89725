from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jdcore.graph._hooks import look
from tests.functions import AFTER_ACCUMULATION

# The same examples in every run, so that a failure is there again tomorrow; no deadline, because
# the first call of a torch operator on a busy machine takes longer than any bound that means
# something. `HYPOTHESIS_PROFILE=explore` draws new examples.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """What a test draws without a seed depends neither on other tests nor on their order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _hooks_of_other_tests_are_known() -> None:
    """
    Hooks that tests before this one made are not on its graphs.

    Some of these are alive: torch never frees a hook that holds the graph that it is on.
    """
    look()


@pytest.fixture(params=AFTER_ACCUMULATION)
def register(request: pytest.FixtureRequest) -> Iterator[Callable[..., RemovableHandle]]:
    """Both ways to have a hook run after accumulation, which is removed in the end."""
    made: list[RemovableHandle] = []

    def registered(leaf: Tensor, hook: Callable[[Tensor], object]) -> RemovableHandle:
        made.append(request.param(leaf, hook))
        return made[-1]

    yield registered
    # Hooks of operations are never freed where they hold, by their leaf, what they are on.
    for handle in made:
        handle.remove()


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors: with more threads than idle cores, most of the time is waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
