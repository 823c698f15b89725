from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
from attrs import Attribute, define, field

from jdcore.errors import MissingPackageError, ParameterTypeError
from jdcore.monitor._numbers import Numbers

_FEW = 16
"""Objectives up to which a log has a curve for each."""

_EXCESS = 2**20
"""Bytes of Gramians of many objectives that a history keeps."""


@define(kw_only=True, eq=False, repr=False)
class Step:
    """
    What one weighing showed; plain numbers, one entry per objective where there are several.

    The numbers are made when one of them is read: a step costs the training next to nothing until
    then, and no accelerator is waited for.

    :param index: Number of the weighing, from 0.
    :param method: Name of the class of the method.
    :param seconds: Wall time of the weighing, that of the Gramian included.
    :param seen: The numbers, or what makes them.
    :param held: Bytes of what that holds, if they are too many to be kept for every step.
    :param change: First-order changes [m] of the losses by the step of the optimizer, see
        :func:`first_order_change`; None if not asked for.
    :param raised: Share of the losses that this step raises to first order; None if not asked for.
    """

    index: int
    method: str
    seconds: float
    _seen: Callable[[], Numbers] | Numbers
    held: int = 0
    change: list[float] | None = None
    raised: float | None = None

    @property
    def numbers(self) -> Numbers:
        """All numbers that are made when they are read."""
        # Once: what it is made from is let go, so that a long history keeps plain numbers only.
        if not isinstance(self._seen, Numbers):
            self._seen, self.held = self._seen(), 0
        return self._seen

    @property
    def weights(self) -> list[float] | None:
        """Weights [m] of the rows; None if the update is no weighted sum of them."""
        return self.numbers.weights

    @property
    def norms(self) -> list[float] | None:
        """
        Lengths [m] of the gradients.

        None, as all that follows, if the method needed no Gramian and none was asked for
        (``complete=True``).
        """
        return self.numbers.norms

    @property
    def products(self) -> list[float] | None:
        """
        Inner products [m] of the update with the gradients.

        By so much each loss falls to first order per unit of learning rate of plain gradient
        descent.
        """
        return self.numbers.products

    @property
    def conflicts(self) -> float | None:
        """Share of the objectives with which the update conflicts beyond rounding."""
        return self.numbers.conflicts

    @property
    def conflicting_pairs(self) -> float | None:
        """Share of the pairs of gradients with a negative cosine."""
        return self.numbers.conflicting_pairs

    @property
    def alignment(self) -> float | None:
        """Alignment score of the gradients, see :func:`~jdcore.linalg.alignment_score`."""
        return self.numbers.alignment

    @property
    def cosines(self) -> list[list[float]] | None:
        """
        Cosines [m, m] between the gradients.

        None for more objectives than ``cosines_up_to`` of :func:`record`.
        """
        return self.numbers.cosines

    @property
    def residual(self) -> float | None:
        """
        Largest relative residual of the problems that the method had to solve.

        None if it solves none, or if a solver tells none.
        """
        return self.numbers.residual

    def to_dict(self) -> dict[str, Any]:
        """All quantities by name; JSON-able."""
        return {
            "index": self.index,
            "method": self.method,
            "seconds": self.seconds,
            **attrs.asdict(self.numbers),
            "change": self.change,
            "raised": self.raised,
        }

    def __repr__(self) -> str:
        known = ((name, value) for name, value in self.to_dict().items() if value is not None)
        return f"Step({', '.join(f'{name}={value!r}' for name, value in known)})"


def _functions(_: Any, attribute: Attribute[Any], value: Any) -> None:
    # A class would be called as well, and make an object that does nothing; what can be gone
    # through once only would be at its end after this.
    several = isinstance(value, Sequence)
    if not several or any(isinstance(f, type) or not callable(f) for f in value):
        expected = "functions of a Step, or objects that are called so, in a tuple"
        raise ParameterTypeError(attribute.name, expected, repr(value))


@define(eq=False, repr=False)
class History:
    """
    The recorded steps, in order.

    Each keeps its numbers, or the few KiB that they are made from when they are read. The Gramians
    of steps with many objectives are kept up to 1 MiB in all: then the numbers are made.

    :param callbacks: Each is called with every new :class:`Step`.
    """

    callbacks: tuple[Callable[[Step], object], ...] = field(default=(), validator=_functions)
    steps: list[Step] = field(factory=list, init=False)
    _large: list[Step] = field(factory=list, init=False)
    _excess: int = field(default=0, init=False)

    def append(self, step: Step) -> None:
        """Add a step and tell the callbacks."""
        self.steps.append(step)
        # Callbacks that read numbers make them now; a loop without any pays nothing.
        for callback in self.callbacks:
            callback(step)
        if step.held:
            self._large.append(step)
            self._excess += step.held
        # Some steps at once: their arrays then find the caches as the last has left them, not as
        # a training step has, and take a third of the time.
        if self._excess > _EXCESS:
            for large in self._large:
                _ = large.numbers
            self._large, self._excess = [], 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]

    def to_dict(self) -> dict[str, list[Any]]:
        """One list per quantity, with one entry per step; JSON-able."""
        rows = [step.to_dict() for step in self.steps]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def frame(self) -> Any:
        """
        A pandas ``DataFrame`` of one row per step, indexed by the number of the step.

        :raises MissingPackageError: If pandas is not installed.
        """
        try:
            # For this call alone: no other part of a record needs it.
            import pandas
        except ImportError as error:
            raise MissingPackageError(["pandas"], "pip install pandas") from error
        return pandas.DataFrame(self.to_dict()).set_index("index")

    def __repr__(self) -> str:
        if not self.steps:
            return "History of no steps"
        last = ", ".join(f"{name} {value:.3g}" for name, value in _summary(self.steps[-1]).items())
        return f"History of {len(self.steps)} steps, the last: {last}"


def scalars(step: Step, prefix: str = "jd/") -> dict[str, float]:
    """
    The numbers of a step under the names that a log gets, such as ``jd/conflicting_pairs``.

    :param prefix: What every name begins with.
    :returns: Single numbers; weights and norms of each of up to 16 objectives, else their extremes.
    """
    found = _summary(step)
    for name, values in (("weight", step.weights), ("norm", step.norms)):
        if values and len(values) <= _FEW:
            found.update({f"{name}/{i}": value for i, value in enumerate(values)})
        elif values:
            found.update({f"{name}/min": min(values), f"{name}/max": max(values)})
    return {prefix + name: value for name, value in found.items()}


def _summary(step: Step) -> dict[str, float]:
    quantities = {
        "conflicts": step.conflicts,
        "conflicting_pairs": step.conflicting_pairs,
        "alignment": step.alignment,
        "raised": step.raised,
        "residual": step.residual,
        "milliseconds": 1e3 * step.seconds,
    }
    # Not NaN, such as the share of conflicting pairs of one gradient: no curve shows it.
    return {k: v for k, v in quantities.items() if v is not None and not math.isnan(v)}
