from __future__ import annotations

import sys
from typing import Any, TextIO

from attrs import Attribute, define, field

from jdcore.errors import ParameterTypeError
from jdcore.monitor._history import Step, scalars
from jdcore.validators import Validator, integer


def _having(*methods: str) -> Validator:
    # When the writer is made: the first step may come hours later.
    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if not any(callable(getattr(value, name, None)) for name in methods):
            expected = f"an object with {' or '.join(methods)}"
            raise ParameterTypeError(attribute.name, expected, repr(value))

    return validate


@define(eq=False)
class TensorBoardWriter:
    """
    Callback that writes the numbers of each step to TensorBoard.

    :param writer: A ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
    :param prefix: What the names of the curves begin with.
    :raises ParameterTypeError: If it has none.
    """

    writer: Any = field(validator=_having("add_scalar"))
    prefix: str = "jd/"

    def __call__(self, step: Step, /) -> None:
        """Write one step."""
        for name, value in scalars(step, self.prefix).items():
            self.writer.add_scalar(name, value, step.index)


@define(eq=False)
class LoggerWriter:
    """
    Callback that hands the numbers of each step to a logger.

    :param logger: Anything with ``log_metrics(dict, step=...)``, as the loggers of Lightning, or
        with ``log(dict, step=...)``, as a run of Weights & Biases.
    :param prefix: What the names of the numbers begin with.
    :raises ParameterTypeError: If it has neither.
    """

    logger: Any = field(validator=_having("log_metrics", "log"))
    prefix: str = "jd/"

    def __call__(self, step: Step, /) -> None:
        """Log one step."""
        # Both take a dictionary and the step, by the same names.
        log = getattr(self.logger, "log_metrics", None) or self.logger.log
        log(scalars(step, self.prefix), step=step.index)


@define(eq=False)
class ProgressLine:
    """
    Callback that keeps one line up to date: the step, and how the objectives get along.

    On a terminal the line is rewritten in place; elsewhere every line stays.

    :param stream: Where to write; standard error by default.
    :param every: Steps from one update of the line to the next.
    """

    # Looked up when the line is made: notebooks and tests replace this stream.
    stream: TextIO = field(factory=lambda: sys.stderr)
    every: int = field(default=10, validator=integer(1))

    def __call__(self, step: Step, /) -> None:
        """Write the line, if it is time."""
        if step.index % self.every:
            return
        terminal = self.stream.isatty()
        # From its start, and cleared: the line before may have been longer.
        self.stream.write(
            ("\r\x1b[2K" if terminal else "") + _line(step) + ("" if terminal else "\n")
        )
        self.stream.flush()


def _line(step: Step) -> str:
    parts = [f"step {step.index}", step.method]
    if step.conflicting_pairs is not None and step.conflicts is not None:
        parts += [f"pairs in conflict {step.conflicting_pairs:.0%}", f"update {step.conflicts:.0%}"]
    if step.alignment is not None:
        parts.append(f"alignment {step.alignment:+.2f}")
    if step.raised is not None:
        parts.append(f"losses raised {step.raised:.0%}")
    return "  ".join([*parts, f"{1e3 * step.seconds:.2f} ms"])
