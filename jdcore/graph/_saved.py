"""
What operations of the graph saved for their derivatives.

These attributes are no public interface of torch: they may be renamed or go in any release. Here is
the only place that reads them. Whoever asks gets :class:`Unreadable` where torch does not show
them, and serves the parameter in a way that needs none.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MATRIX_PRODUCTS", "Unreadable", "saved", "saved_as_it_is"]

MATRIX_PRODUCTS = {"AddmmBackward0": (2, "mat1"), "MmBackward0": (1, "self")}
"""Matrix products: which operand is the weight, and under which name the other one is saved."""


class Unreadable(Exception):  # noqa: N818 - no error of anybody
    """Torch does not show what an operation saved."""


def saved(node: Any, name: str) -> Any:
    """
    Something that an operation of the graph saved.

    :param name: As in the formulas of torch's derivatives, such as "self" or "alpha".
    :raises Unreadable: If torch does not show it.
    """
    try:
        return getattr(node, f"_saved_{name}")
    except AttributeError:
        raise Unreadable(f"{node.name()} does not show {name!r}") from None


def saved_as_it_is(node: Any, name: str) -> Any:
    """
    :func:`saved`, but refusing to run Python code for it.

    Hooks of saved tensors (of checkpoints, of offloading) would make it anew for whoever asks.

    :raises Unreadable: If there are such hooks, if torch does not show it, or if it was freed or
        modified in place, as differentiating will say.
    """
    raw: Any = getattr(node, f"_raw_saved_{name}", None)
    unhooked = hasattr(raw, "unpack_hook") and raw.unpack_hook is None
    if not unhooked:
        raise Unreadable(f"{node.name()} does not show {name!r} as it is")
    try:
        return saved(node, name)
    except RuntimeError as error:
        raise Unreadable(str(error)) from error
