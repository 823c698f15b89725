from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jdcore.autojac.transform._base import Transform, Values, describe_keys


class PerTask(Transform):
    """
    Run one transform per task and put their gradients together.

    A key in ``rows`` becomes a Jacobian with one row per task (zeros where a task does not give the
    key); any other key becomes the sum over the tasks that give it.

    :param tasks: One transform per task, in the order of the rows.
    :param rows: Keys of which each task has its own row.
    """

    def __init__(self, tasks: Sequence[Transform], rows: Iterable[Tensor]) -> None:
        self.tasks = tuple(tasks)
        self.rows = tuple(rows)
        given = [key for task in self.tasks for key in task.gives]
        super().__init__([key for task in self.tasks for key in task.needs], [*self.rows, *given])

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        m = len(self.tasks)
        rows = {key: _zeros((m, *key.shape), key) for key in self.rows}
        # All views at once: to index each row would take as many calls as there are rows.
        places = {key: row.unbind() for key, row in rows.items()}
        sums: dict[Tensor, Tensor] = {}
        for i, task in enumerate(self.tasks):
            own: dict[Tensor, Tensor] = {}
            for key, value in task(values).items():
                if key in places:
                    own[places[key][i]] = value
                elif key in sums:
                    sums[key].add_(value)
                else:
                    # A gradient can share its memory with another one (as those of a + b do), or
                    # with what it was computed from.
                    sums[key] = value.clone()
            if own:
                # One call, and on accelerators few kernels, for all of them.
                torch._foreach_copy_(list(own), list(own.values()))
        return rows | sums

    def __repr__(self) -> str:
        inner = "".join(f"\n  {task!r}".replace("\n>>", " >>") for task in self.tasks)
        return f"PerTask(rows of {describe_keys(self.rows)}:{inner})"


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
