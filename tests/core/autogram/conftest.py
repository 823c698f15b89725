from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jdcore.graph import Site, _serving


@pytest.fixture(autouse=True, scope="session")
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that no closed form served, in order."""
    seen: list[str] = []
    original = _serving.called_shares

    def noting(site: Site, *rest: Any) -> Any:
        seen.append(site.name)
        return original(site, *rest)

    monkeypatch.setattr(_serving, "called_shares", noting)
    return seen


@pytest.fixture
def only_closed_forms(called: list[str]) -> Iterator[None]:
    yield
    assert called == []
