from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

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
