"""
What custom functions keep in their context, besides the operands that the graph shows.

The blocks of reversible networks, for one, keep the modules that they run once more in their
backward pass, which accumulates into the ``.grad`` of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

# How deep attributes, containers and closures are searched for modules.
_DEPTH = 5


def kept_leaves(functions: Iterable[Any]) -> list[Tensor]:
    """
    Leaves that custom functions keep in attributes of their context, there or inside of modules.

    They may accumulate into the ``.grad`` of these.

    :param functions: Their nodes. Torch's own operations have all of their operands as edges.
    """
    found: dict[Tensor, None] = {}
    seen: set[int] = set()
    for node in functions:
        # The node of a custom function is the `ctx` of its forward, with all that was set there.
        _collect(vars(node), found, seen, _DEPTH)
    return list(found)


def _collect(value: Any, found: dict[Tensor, None], seen: set[int], depth: int) -> None:
    # Contexts may refer to themselves, and to whatever else the user keeps there: a whole trainer,
    # say.
    if id(value) in seen or depth < 0:
        return
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            found[value] = None
        return
    seen.add(id(value))
    for part in _parts(value):
        _collect(part, found, seen, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, nn.Module):
        return value.parameters()
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set)):
        return value
    # Reversible blocks often keep the forward of their halves as a bound method, a partial or a
    # closure.
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises for a variable that is not assigned yet
    except ValueError:
        return False
    return True
