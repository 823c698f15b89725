"""Whether a Gramian rule and its operation are where the spec says."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from jdcore._registry import get_gramian_rule, load_factory
from jdcore._tables import Entry
from jdcore.graph import RULES


def trouble_of(entry: Entry) -> str | None:
    """
    What would keep a rule from ever serving its operation, or None.

    Nothing is wrong where the library of the operation is not installed: nobody can call it then.

    :raises PluginError: If the rule or its operation cannot be imported or called.
    """
    get_gramian_rule(entry)
    operation = entry.spec.operation
    module, colon, _ = operation.partition(":")
    if not colon:
        return f"the core has a rule for {operation!r}" if operation in RULES else None
    if find_spec(module.partition(".")[0]) is None:
        return None
    function = load_factory(entry, operation)
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return None
    return f"the operation {operation!r} is no torch.autograd.Function"
