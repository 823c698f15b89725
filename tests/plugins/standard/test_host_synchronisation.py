"""On an accelerator, the host waits for the solver of many rows at its stopping tests alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jdcore.linalg import add_proximal, gramian, proximal_level
from jdcore.testing import family
from jdplugins.standard._solvers import NativeDualConeSolver, _guess


class _Waits(TorchDispatchMode):
    """Counts what would make the host wait for an accelerator."""

    asked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if name in ("index", "index_put", "index_put_") else ())
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique"):
            self.asked += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Waits]:
    mode = _Waits()
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        mode.asked += 1
        return tolist(tensor)

    with monkeypatch.context() as patch, mode:
        patch.setattr(Tensor, "tolist", counted)
        patch.setattr(_guess, "_CHECK", 1 << 30)  # as elsewhere: no look at every few steps
        yield mode


def gramian_of(kind: str, m: int) -> Tensor:
    rows = family(kind, m, 2 * m, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(add_proximal(gramian(rows).numpy(), proximal_level(m, torch.float32)))


@pytest.mark.parametrize("kind", ["gauss", "conflict", "badscale"])
def test_the_host_waits_once_for_a_round_of_pivots_or_corrections(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    G, U = gramian_of(kind, 64), torch.eye(64, dtype=torch.float64)

    with waits(monkeypatch) as mode:
        V = NativeDualConeSolver().project(G, U)

    assert bool((V >= U).all())
    # Two for the form of U and of C, two for what is left, one for the warning; up to six rounds,
    # and one where most entries are positive.
    assert 3 <= mode.asked <= 12


def test_the_host_does_not_wait_longer_for_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for m in (96, 192):
        G, U = gramian_of("gauss", m), torch.eye(m, dtype=torch.float64)
        with waits(monkeypatch) as mode:
            NativeDualConeSolver().project(G, U)
        asked.append(mode.asked)

    assert asked[1] <= asked[0] + 2
