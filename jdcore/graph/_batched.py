"""Several backward passes in one, by ``torch.vmap``, and what shows that they are right."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from jdcore._living import living
from jdcore.graph._operations import some_looped
from jdcore.graph._passes import differentiate
from jdcore.graph._saved import is_batched
from jdcore.graph.shares import combined

# What `torch.vmap` is made of is no public interface, so a release may do without it. Then `vmap`
# itself serves; its checks of each result take as long as differentiating a small network.
try:
    from torch._C import _functorch as functorch
    from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]

    QUICK = all(
        hasattr(functorch, name)
        for name in (
            "_add_batch_dim",
            "_remove_batch_dim",
            "_vmap_increment_nesting",
            "_vmap_decrement_nesting",
        )
    )
except ImportError:
    QUICK = False


# Batched tensors that outlive their passes, and whose passes were refused or failed: they are there
# as long as a hook of the user keeps them, or somebody the error, as an interactive session does.
_LEFT = WeakTensorKeyDictionary()

# One entry for each pass that runs, in whatever thread: to append and to pop are atomic.
_RUNNING: list[None] = []


def some_are_batched_now() -> bool:
    """Whether passes of another thread have batched tensors that live for good reason."""
    return bool(_RUNNING)


def is_known_to_be_left(tensor: Tensor) -> bool:
    """Whether a batched tensor is left of a pass that was refused, or failed."""
    return tensor in _LEFT


def note_left(tensors: Iterable[Tensor]) -> None:
    """Remember batched tensors that a pass left behind, so that no later pass is blamed."""
    _LEFT.update({tensor: None for tensor in tensors if is_batched(tensor)})


@contextmanager
def _noted() -> Iterator[None]:
    _RUNNING.append(None)
    try:
        yield
    except BaseException:
        if len(_RUNNING) == 1:  # else they may be those of another thread
            note_left(living(Tensor))
        raise
    finally:
        _RUNNING.pop()


def without_warning(names: Iterable[str] | None = None) -> AbstractContextManager[object]:
    """
    Let vmap run row by row, without a word, what it cannot batch, as we would do ourselves.

    :param names: Those of the operations, if they are known.
    """
    # Only where it may warn: once the filters have changed, Python shows again what it showed once,
    # such as the warnings of the user's own loop.
    return _silent() if names is None or some_looped(names) else nullcontext()


@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def batched_gradients(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor],
    retain_graph: bool,
) -> list[Tensor | None]:
    """
    Differentiate several rows in one pass.

    :param outputs: Tensors, or edges of the graph.
    :param inputs: Likewise.
    :param cotangents: Initial Jacobians ``[m, *S_output]``, one per output.
    :returns: One tensor ``[m, *S_input]`` per input, None where no output depends on it.
    """

    def row(*gradients: Tensor) -> tuple[Tensor | None, ...]:
        return differentiate(outputs, inputs, gradients, retain_graph)

    with _noted():
        if not QUICK:
            return _by_vmap(row, cotangents, len(inputs))
        # What `torch.vmap` does around a function. Some rules are made when they are needed first.
        lazy_load_decompositions()
        m = cotangents[0].shape[0]
        # Random numbers are drawn by checkpoints that run the forward pass again, for all rows.
        level = functorch._vmap_increment_nesting(m, "same")
        try:
            found = row(*[functorch._add_batch_dim(c, 0, level) for c in cotangents])
            return [
                None if g is None else functorch._remove_batch_dim(g, level, m, 0) for g in found
            ]
        finally:
            functorch._vmap_decrement_nesting()


def _by_vmap(row: Any, cotangents: Sequence[Tensor], count: int) -> list[Tensor | None]:
    reached: list[int] = []

    def tensors(*gradients: Tensor) -> list[Tensor]:
        results = row(*gradients)
        # vmap calls this function once, and lets it return tensors only: their places are noted
        # beside.
        reached.extend(i for i, result in enumerate(results) if result is not None)
        return [result for result in results if result is not None]

    found: list[Tensor | None] = [None] * count
    for i, result in zip(
        reached, torch.vmap(tensors, randomness="same")(*cotangents), strict=False
    ):
        found[i] = result
    return found


def mixed(rows: Tensor) -> Tensor:
    """One combination of rows [m, ...], in their dtype."""
    return _combination(rows.reshape(len(rows), -1)).view(rows.shape[1:]).to(rows)


def agree(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """
    Whether rows are those of single passes, as far as finite numbers tell.

    Some derivatives of torch are wrong under vmap, without a word (that of ``cdist``, for one).

    :param pairs: Rows [m, ...], and what a single pass made of what :func:`mixed` makes of the
        gradients that they come from. All of them are judged by the largest, since some may be zero
        but for rounding.
    """
    pieces = [_real(rows, expected) for rows, expected in pairs]
    pieces = [(rows, expected) for rows, expected in pieces if rows.numel()]
    if not pieces:
        return True
    device = pieces[0][0].device
    scale = torch.stack([_magnitude(rows).to(device) for rows, _ in pieces]).max()
    # Two orders of summing differ by some eps of the sum of magnitudes. The root of eps is far
    # above that and far below what a wrong derivative is wrong by.
    wrong = [
        (_combination(rows).double() - expected.double()).abs().max().to(device)
        > torch.finfo(rows.dtype).eps ** 0.5 * scale
        for rows, expected in pieces
    ]
    return not bool(torch.stack(wrong).any())  # what is not finite cannot be told


def _combination(rows: Tensor) -> Tensor:
    # All different and none of them zero, so that rows in a wrong order, or a missing one, show.
    # No wider than the rows, which may be as large as all activations and would be copied.
    factors = torch.linspace(0.5, 1.5, len(rows), dtype=_wide(rows), device=rows.device)
    return combined(factors, rows)


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _real(rows: Tensor, expected: Tensor) -> Sequence[Tensor]:
    if rows.is_complex():
        # Torch conjugates lazily, and refuses to view such a tensor as real.
        rows, expected = (torch.view_as_real(t.resolve_conj()) for t in (rows, expected))
    return rows.reshape(len(rows), -1), expected.reshape(-1)


def _magnitude(rows: Tensor) -> Tensor:
    return rows.abs().sum(0, dtype=_wide(rows)).max().double()
