"""What is dispatched while something runs: the same on every machine, unlike times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations that run inside of it by their names; under vmap, one for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = function.overloadpacket.__name__
        if self.is_counted(name, function):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    def is_counted(self, name: str, function: Any) -> bool:
        """Whether an operation counts; all do, unless a test says otherwise."""
        del name, function
        return True
