"""
Every exception and warning class of jdcore, and how to warn.

All exceptions subclass :class:`JDCoreError` and a builtin, so ``except ValueError`` keeps working,
and carry the parts of their message as attributes. Messages follow one grammar::

    Parameter `c` must be >= 0, got -1.0.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

__all__ = [
    "AmbiguousNameError",
    "GraphError",
    "JDCoreError",
    "JDCoreWarning",
    "MissingMethodError",
    "MissingPackageError",
    "NonDifferentiableError",
    "NonFiniteError",
    "ParameterError",
    "ParameterTypeError",
    "PeerError",
    "PluginError",
    "PluginWarning",
    "RowByRowWarning",
    "SinglePassError",
    "TransformError",
    "UnknownNameError",
    "UnservedGraphError",
    "UnsolvedWarning",
    "VectorizationError",
    "VectorizationWarning",
    "warn",
]


def message_of(error: BaseException) -> str:
    """The message of any exception; there are some that break when they are shown."""
    try:
        return str(error)
    except BaseException:
        return "(its message cannot be shown)"


def one_line(text: str) -> str:
    """A text without line breaks, and without the control characters that a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def line_of(error: BaseException) -> str:
    """Class and message of any exception, in one line."""
    return one_line(f"{type(error).__name__}: {message_of(error)}")


class _OfParts:
    """What is rebuilt from the parts of its message, e.g. in another process."""

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Exceptions are rebuilt from ``args`` (the message) by default, which drops the parts: the
        # fields called as the arguments of the constructor.
        code = type(self).__init__.__code__
        names = code.co_varnames[1 : code.co_argcount]
        return type(self), tuple([getattr(self, name) for name in names])


class JDCoreError(Exception):
    """Base class of every exception that jdcore raises on purpose."""


class ParameterError(_OfParts, JDCoreError, ValueError):
    """
    An argument has an unusable value.

    :param parameter: Name of the parameter, as the caller wrote it.
    :param expected: What was expected, completing "must be ...".
    :param got: What came: a description or the value itself (shown with ``str``).
    :param hint: What to do instead, a full sentence, if there is one way out.
    """

    def __init__(self, parameter: str, expected: str, got: object, hint: str | None = None) -> None:
        self.parameter = parameter
        self.expected = expected
        self.got = got
        self.hint = hint
        message = f"Parameter `{parameter}` must be {expected}, got {got}."
        super().__init__(message if hint is None else f"{message} {hint}")


class ParameterTypeError(ParameterError, TypeError):
    """An argument has an unusable type. Same parts as :class:`ParameterError`."""


class UnknownNameError(_OfParts, JDCoreError, LookupError):
    """
    A look-up found nothing under this name.

    :param name: The name that was asked for.
    :param kind: What was looked up, e.g. ``"aggregator"``.
    :param close: Registered names that look alike, best first.
    :param known: All registered names of this kind.
    :param hint: How to get the name, if the catalogue of known distributions has it.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        close: Sequence[str] = (),
        known: Sequence[str] = (),
        hint: str | None = None,
    ) -> None:
        parts = [f"No {kind} is registered under the name {name!r}."]
        if hint is not None:
            parts.append(hint)
        if close:
            parts.append(f"Close matches: {', '.join(close)}.")
        parts.append(f"Registered: {', '.join(known) or 'none'}.")
        super().__init__(" ".join(parts))
        # Afterwards, since from Python 3.14 on the constructor of ImportError sets `name` anew.
        self.name = name
        self.kind = kind
        self.close = tuple(close)
        self.known = tuple(known)
        self.hint = hint


class MissingMethodError(UnknownNameError, ImportError):
    """An import from ``jdcore.aggregation`` asked for a known method that is not installed."""

    name: str  # both bases have it


class MissingPackageError(_OfParts, JDCoreError, ImportError):
    """
    A package is needed that jdcore does without otherwise, and it is not installed.

    :param packages: Names of the packages.
    :param command: What installs them.
    """

    def __init__(self, packages: Sequence[str], command: str) -> None:
        super().__init__(f"Not installed: {', '.join(packages)}. Run: {command}")
        self.packages = tuple(packages)
        self.command = command


class AmbiguousNameError(_OfParts, JDCoreError, LookupError):
    """
    Several distributions provide this name, so none of them gets it.

    :param name: The name that was asked for.
    :param kind: What was looked up, e.g. ``"aggregator"``.
    :param candidates: The qualified names (``"distribution:name"``) that do work.
    """

    def __init__(self, name: str, kind: str, candidates: Sequence[str]) -> None:
        self.name = name
        self.kind = kind
        self.candidates = tuple(candidates)
        super().__init__(
            f"The {kind} name {name!r} is provided by several distributions. "
            f"Ask for one of: {', '.join(repr(c) for c in self.candidates)}."
        )


class PluginError(_OfParts, JDCoreError, RuntimeError):
    """
    A plugin that is needed for an explicit request could not be used; the cause is chained.

    :param plugin: The plugin, as ``"distribution (entry point)"``.
    :param reason: Why it cannot be used, one sentence.
    """

    def __init__(self, plugin: str, reason: str) -> None:
        self.plugin = plugin
        self.reason = reason
        super().__init__(f"Plugin {plugin} cannot be used: {reason}")


class NonFiniteError(_OfParts, JDCoreError, ArithmeticError):
    """
    A Jacobian or Gramian holds NaN or infinite values, and finite ones were asked for.

    :param rows: Indices of the objectives (rows) concerned.
    :param what: What of them is not finite: ``"gradients"`` or ``"values"``.
    """

    def __init__(self, rows: Sequence[int], what: str = "gradients") -> None:
        self.rows = tuple(rows)
        self.what = what
        super().__init__(
            f"The {what} of objectives {list(self.rows)} hold NaN or infinite values. "
            "Look for a diverging loss, or unset check_finite to get NaN weights instead."
        )


class NonDifferentiableError(_OfParts, JDCoreError, RuntimeError):
    """
    Differentiation went through a method that has no derivative.

    :param method: ``repr`` of the weighting or aggregator.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        super().__init__(
            f"{method} is not differentiable. Detach its input (or run it under torch.no_grad()) "
            "if no derivative through the aggregation is wanted."
        )


class TransformError(JDCoreError, ValueError):
    """
    Two transforms do not fit together.

    :param message: Which transforms, and which keys are missing or doubled.
    """


class PeerError(_OfParts, JDCoreError, RuntimeError):
    """
    Another process could not take part in a step, so no process made it.

    :param rank: Rank of that process among all, None if the processes did different things.
    :param reason: What it raised, or what differs.
    """

    def __init__(self, rank: int | None, reason: str) -> None:
        self.rank = rank
        self.reason = reason
        who = (
            "The processes cannot make this step together"
            if rank is None
            else (f"Process {rank} could not make this step")
        )
        super().__init__(f"{who}, so nothing is written on any: {reason}")


class GraphError(_OfParts, JDCoreError, RuntimeError):
    """
    The graph of what is differentiated does not allow what was asked for: base of all such errors.

    They are raised before any number is returned and before any field changes.
    """

    remedy: str
    """What to do instead, a full sentence."""
    layer: str | None = None
    """
    The module at fault, as ``named_modules`` calls it.

    None where the graph does not show it, or nobody gave modules: only an engine knows some.
    """


class SinglePassError(GraphError):
    """
    A graph can be differentiated only once, although several objectives need a pass each.

    :param reason: What in the graph does not last.
    :param remedy: What to do instead, a full sentence.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(
            "Several objectives need a backward pass each, but the graph allows one only: "
            f"{reason}. {remedy}"
        )


class UnservedGraphError(GraphError, ParameterError):
    """
    A graph holds something with which the result could not be shown to be right.

    :param operation: The operation or layer at fault, as far as it is known, a noun phrase.
    :param reason: Why it cannot be served, a clause with "it" as its subject.
    :param remedy: What to do instead, a full sentence.
    :param parameter: Name of the argument that does not fit the graph, mostly the losses.
    :param expected: What the argument must be.
    :param layer: The module at fault, see :class:`GraphError`.
    :param where: Where the operation is, as far as it is known, a phrase behind it.
    """

    tensors: Sequence[Any] = ()
    """Parameters and buffers at fault, which tell an engine the layer. Not kept afterwards."""

    def __init__(
        self,
        operation: str,
        reason: str,
        remedy: str,
        parameter: str = "output",
        expected: str = "computed by operations that autogram can serve",
        layer: str | None = None,
        where: str = "",
    ) -> None:
        self.operation, self.reason, self.remedy = operation, reason, remedy
        self.layer, self.where = layer, where
        got = f"{operation} {where}".rstrip()
        ParameterError.__init__(self, parameter, expected, f"{got}: {reason}", remedy)

    def at(self, tensors: Iterable[Any]) -> UnservedGraphError:
        """
        Say where the fault is.

        :param tensors: Parameters or buffers of the operation, as far as they are known.
        """
        self.tensors = tuple(tensors)
        return self

    def tell(self, parameter: str, layer: str | None, where: str) -> None:
        """Say what operations do not know: the argument, and where they are, as for a new one."""
        # Not of the subclass that it may be, whose constructor may take anything.
        own = self.operation, self.reason, self.remedy
        UnservedGraphError.__init__(self, *own, parameter, self.expected, layer, where)
        self.tensors = ()


class VectorizationError(GraphError):
    """
    Several rows could not be differentiated at once, although a chunk size above 1 was asked for.

    :param reason: The operation at fault, as far as it is known, and what it said.
    """

    remedy = "Leave parallel_chunk_size at None, which falls back by itself, or set it to 1."

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The rows cannot be differentiated several at a time: {reason} {self.remedy}"
        )


class JDCoreWarning(UserWarning):
    """Base class of every warning that jdcore emits."""


class PluginWarning(JDCoreWarning):
    """Discovery left something out: a plugin failed, or a name is claimed twice."""


class RowByRowWarning(_OfParts, JDCoreWarning):
    """
    Each loss of a batch gets a backward pass of its own, where one could have served all samples.

    :param rows: Number of losses.
    :param reason: Why, a clause.
    """

    def __init__(self, rows: int, reason: str) -> None:
        self.rows = rows
        self.reason = reason
        super().__init__(
            f"Each of the {rows} losses gets a backward pass of its own, since {reason}. The "
            "result is right, but slow. Hooks of modules, optimizers and parameters do no harm; "
            "those of tensors and of operations (`grad_fn`) do."
        )


class UnsolvedWarning(_OfParts, JDCoreWarning):
    """
    An optimisation problem was not solved to its promised accuracy.

    :param problem: Name of the problem, e.g. ``"dual_cone"``.
    :param residual: What is left of the optimality conditions, relative to the problem's scale.
    :param reason: Why, if it is not the problem itself.
    """

    def __init__(
        self,
        problem: str,
        residual: float,
        reason: str = "its rows are dependent to working precision",
    ) -> None:
        self.problem = problem
        self.residual = residual
        self.reason = reason
        super().__init__(
            f"The {problem} problem was solved only up to a relative residual of {residual:.1e}: "
            f"{reason}. The best weights found are returned."
        )


class VectorizationWarning(_OfParts, JDCoreWarning):
    """
    Rows that were to be differentiated several at once are differentiated one by one.

    :param reason: The operation at fault, as far as it is known, and what it said.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            "Differentiating several rows at once failed for this kind of graph, so its rows are "
            f"differentiated one by one: {reason} The result is the same. Set "
            "parallel_chunk_size=1 to do so from the start."
        )


def warn(warning: Warning) -> None:
    """
    Warn at the line of the user's code that called into jdcore or one of its plugins.

    :param warning: An instance; its class is the category.
    """
    # `skip_file_prefixes` would do this from Python 3.12 on; `stacklevel` leaves frames of imports
    # out as it counts.
    frame = sys._getframe(1)
    inside = _INSIDE | {_package_of(frame)}
    while frame.f_back is not None and _package_of(frame) in inside:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    place = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    warnings.warn_explicit(warning, type(warning), *place, registry)


def left_out(owner: object, method: str) -> NotImplementedError:
    """
    The error of a base class for a method that its subclasses implement.

    :param owner: An object of the subclass.
    """
    return NotImplementedError(f"{type(owner).__name__} must implement `{method}`.")


# Frames of these packages are ours, or stand between ours and those of the user: torch.no_grad and
# np.errstate as decorators, a backward pass, a hook, a cached property, an import.
_INSIDE = {"jdcore", "jdplugins", "torch", "numpy", "attr", "pluggy", *sys.stdlib_module_names}


def _package_of(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
