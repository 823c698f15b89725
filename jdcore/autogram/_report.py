"""What served each parameter, and how right it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from jdcore.autogram._step import Step
from jdcore.graph import Graph, Jacobian, Place
from jdcore.graph._functions import tampers
from jdcore.graph._root_shares import Served


@frozen
class Check:
    """
    How a parameter was served, and how far that is from rows by plain backward passes.

    :param parameter: Its name.
    :param operation: The operations that it enters.
    :param share: The forms of its shares of the Jacobian.
    :param rule: What made them.
    :param error: Relative error of its Gramian or of its weighted gradient, the larger one; for a
        parameter whose rows are zero but for rounding, relative to the longest rows of all.
    """

    parameter: str
    operation: str
    share: str
    rule: str
    error: float


@frozen
class Verification:
    """
    What :meth:`Engine.verify <jdcore.autogram.Engine.verify>` found; printed, it is a table.

    :param checks: One for each parameter behind the losses.
    """

    checks: tuple[Check, ...]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    @property
    def worst(self) -> float:
        """The largest error, NaN if there is one."""
        errors = torch.tensor([check.error for check in self.checks] or [0.0], device="cpu")
        return float(errors.max())

    def __str__(self) -> str:
        header = ("parameter", "operation", "share", "rule", "error")
        rows = [(c.parameter, c.operation, c.share, c.rule, f"{c.error:.1e}") for c in self.checks]
        return _table([header, *rows])


def explained(step: Step, names: Mapping[Tensor, str]) -> str:
    """A table of what serves each parameter."""
    # What serves an operand is decided as its gradient arrives, so that a pass has to be made.
    with step.opened(report=True) as jacobian:
        jacobian.gramian(keep=False, retain_graph=True)
    entries = _by_parameter(jacobian, names)
    rows = [(c.parameter, c.operation, c.share, c.rule) for c in entries.values()]
    table = _table([("parameter", "operation", "share", "rule"), *rows])
    if jacobian.one_by_one is None:
        return table
    return f"{table}\nEach loss has a backward pass of its own: {jacobian.one_by_one}."


def verified(step: Step, names: Mapping[Tensor, str]) -> Verification:
    """Each parameter against its rows."""
    with step.opened(report=True) as whole:
        whole.gramian(keep=False, retain_graph=True)
        entries = _by_parameter(whole, names)
        # As below, only those functions run that are on the way to one parameter, where some write
        # into gradients that others get as well.
        parts = [[tensor] for tensor in entries] if tampers(whole.graph) else [list(entries)]
        # Plain passes write the `.grad` of what retains it.
        with whole.fields_unchanged():
            rows = [row for part in parts for row in plain_rows(step.objectives.outputs, part)]
    longest = max((float(of_tensor.norm()) for of_tensor in rows), default=0.0)
    # Rows shorter than that are zero but for rounding, as those of a bias in front of a norm.
    nothing = _ROUNDING * torch.finfo(whole.graph.form.precision).eps * longest
    checks = [
        # One parameter at a time: an error shows at the parameter that it comes from, and cannot
        # drown in the sum over all.
        evolve(
            check,
            error=_error(
                evolve(step, wanted=[tensor], all_leaves=False),
                of_tensor,
                longest if of_tensor.norm() <= nothing else 0.0,
            ),
        )
        for (tensor, check), of_tensor in zip(entries.items(), rows, strict=True)
    ]
    return Verification(tuple(checks))


def _by_parameter(jacobian: Jacobian, names: Mapping[Tensor, str]) -> dict[Tensor, Check]:
    served: dict[Tensor, list[Served]] = {}
    # Of an empty batch nothing was made.
    for entry in jacobian.roots.served if jacobian.roots else ():
        for tensor in _behind(jacobian.graph, entry.root):
            served.setdefault(tensor, []).append(entry)
    return {
        tensor: Check(
            names.get(tensor, f"a tensor of shape {list(tensor.shape)}"),
            _joined([entry.operation for entry in served[tensor]]),
            _joined([entry.share for entry in served[tensor]]),
            _joined([entry.how for entry in served[tensor]]),
            float("nan"),
        )
        # In the order of the modules; tensors without a name come last.
        for tensor in dict.fromkeys([*names, *served])
        if tensor in served
    }


def _behind(graph: Graph, root: Place) -> list[Tensor]:
    """The wanted tensors that an operand is computed from."""
    if root in graph.targets:
        return [graph.targets[root]]
    found, seen, stack = [], {root[0]}, [root[0]]
    while stack:
        node = stack.pop()
        if node in graph.wanted:
            found.append(graph.wanted[node])
        children = [
            c for c, _ in graph.form.inputs[node] if c in graph.form.leading and c not in seen
        ]
        seen.update(children)
        stack += children
    return found


def _joined(parts: Sequence[str]) -> str:
    return " + ".join(part if n == 1 else f"{n} {part}" for part, n in Counter(parts).items())


def plain_rows(outputs: Iterable[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Jacobian by one backward pass for each loss, float64 [m, n] for each tensor."""
    rows: list[list[Tensor]] = [[] for _ in tensors]
    with torch.enable_grad():  # each loss is a part of the output by an operation of the graph
        losses = [loss for output in outputs for loss in output.reshape(-1)]
    for loss in losses:
        found = torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True)
        for of_tensor, grad in zip(rows, found, strict=True):
            of_tensor.append(grad.to_dense().flatten().double())
    return [torch.stack(of_tensor) for of_tensor in rows]


_ROUNDING = 100.0
"""Times the eps of their precision, what is left of rows that cancel."""


def _error(step: Step, rows: Tensor, length: float) -> float:
    """
    The error of one parameter.

    :param rows: Its rows by plain passes.
    :param length: What to measure rows by that are zero but for rounding; else zero.
    """
    # All different and of both signs, so that rows in a wrong order show.
    weights = torch.linspace(-1.0, 2.0, len(rows), dtype=torch.float64, device=rows.device)
    # The Gramian does not see everything: rows that are all rotated alike have the same one, but
    # another weighted sum.
    [tensor] = step.wanted
    with step.opened(report=True) as jacobian:
        gramian = jacobian.gramian(keep=True, retain_graph=True)
        gradient = jacobian.weighted(weights, retain_graph=True)[tensor]
    expected = rows @ rows.T
    return max(
        _relative(gramian, expected, length**2),
        _relative(gradient.to_dense().flatten(), weights @ rows, length),
    )


def _relative(got: Tensor, expected: Tensor, length: float) -> float:
    error, scale = (got.double() - expected).norm(), expected.norm().clamp(min=length)
    return float(error / scale) if scale > 0 else float(error)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in line).rstrip() for line in lines)
