from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from jdcore import JDCoreError
from tests.zoo.models import MODELS
from tests.zoo.specimen import IWRM, KINDS, MTL, Kind, check, check_against, losses_of, rows_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
    pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning"),  # some have hooks
]

APART = [name for name in MODELS if not MODELS[name]().mixes]
MIXED = [name for name in MODELS if name not in APART]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", APART)
def test_in_float64_all_digits_are_right(name: str, kind: Kind) -> None:
    check(MODELS[name]().to(torch.float64), kind, 1e-12)


@pytest.mark.parametrize("name", APART)
def test_float32_is_near_the_rows_of_float64(name: str) -> None:
    specimen = MODELS[name]()
    check(specimen, IWRM, specimen.single, specimen.to(torch.float64))


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_mix_are_no_matter_to_losses_without_samples(name: str) -> None:
    check(MODELS[name]().to(torch.float64), MTL, 1e-12)


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_mix_are_refused_or_right(name: str) -> None:
    with suppress(JDCoreError):
        check(MODELS[name]().to(torch.float64), IWRM, 1e-12)


AUTOCAST = ["mlp_on_sequences", "residual", "transformer", "tied_embedding", "merged_lora"]


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_is_near_the_rows_of_autocast(name: str) -> None:
    specimen = MODELS[name]()
    rows = rows_of(losses_of(specimen, IWRM, torch.bfloat16), specimen.parameters)
    check_against(specimen, lambda: losses_of(specimen, IWRM, torch.bfloat16), 0, rows, 2e-2)
