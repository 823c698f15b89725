"""The tables that the commands draw on a terminal, for which rich has to be installed."""

from __future__ import annotations

import sys

import pytest

from jdcore._commands import _output
from jdcore.cli import main

pytest.importorskip("rich")


def test_on_a_terminal_a_table_is_drawn_by_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    _output.print_table(("name", "text"), [("even", "[m, m]")])
    printed = capsys.readouterr().out

    assert "[m, m]" in printed  # no markup of rich
    assert "─" in printed


def test_on_a_terminal_the_listing_needs_two_columns_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")

    assert main(["list"]) == 0

    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "gramian, from jdplugins-standard" in lines
    assert "permutation_invariant, scale_equivariant" in lines
