from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from jdcore._modes import refuse_tangents, without_graph
from jdcore.aggregation._columns import Columns, power
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.linalg import add_proximal, proximal_level, rounding_shows
from jdcore.linalg._blas import is_small, small_gramian
from jdcore.validators import FLOATS, describe_tensor, holds_real_numbers

# Rows whose Gramian an accelerator copies in less time than it is told what to compute.
_COPIED = 64
# What products of unit rows may be wrong by where they were made in TF32, which keeps 10 bits.
_ROUGH_PRODUCTS = 5e-3
_NARROW = (torch.float32,)
_AT_ONCE = 1 << 13  # entries, of which new arrays cost no page faults


def _one() -> float:
    return 1.0


def _checked(gramian: Tensor, tolerance: float) -> Tensor:
    """
    A matrix that is said to be a Gramian; read when a method asks for it.

    :param gramian: float64 Tensor [m, m]. NaN and infinities pass, as they give NaN weights.
    :param tolerance: What the products of unit rows may be wrong by.
    :raises ParameterError: If its entries are products of no rows: squared lengths are not
        negative, no cosine is above one, and the two triangles agree.
    """
    array = gramian.numpy(force=True)
    least = array.diagonal().min(initial=0.0)
    if least < 0.0:
        raise _no_gramian("whose squared lengths are on its diagonal", f"{least:.3g} there")
    reason = _reason_against(array, tolerance)
    if reason is not None and np.isfinite(array).all():
        raise _no_gramian(*reason)
    return gramian


@np.errstate(invalid="ignore", over="ignore")
def _reason_against(array: NDArray[np.float64], tolerance: float) -> tuple[str, str] | None:
    """What a Gramian has, and what a matrix has in its place."""
    lengths = np.sqrt(array.diagonal())
    step = max(1, _AT_ONCE // max(1, len(array)))
    for start in range(0, len(array), step):
        some = slice(start, start + step)
        rows, columns = array[some], array[:, some].T
        largest = np.multiply.outer((1.0 + tolerance) * lengths[some], lengths)
        if ((rows > largest) | (rows < -largest)).any():
            return "whose cosines are at most 1", "larger ones"
        # Nearly always, they agree bit by bit.
        if (rows != columns).any() and (np.abs(rows - columns) > tolerance * largest).any():
            return "which is symmetric", "triangles that differ"
    return None


def _no_gramian(expected: str, got: str) -> ParameterError:
    return ParameterError(
        "gramian",
        f"the Gramian J @ J.T of some rows, {expected}",
        f"a matrix with {got}",
        "Multiply in float64 if rounding made it so.",
    )


@define(eq=False)
class GramianSource:
    """
    What a weighting may ask of the Jacobian that it weighs; the Gramian is computed if it asks.

    Methods that ask for the number of rows alone, such as the mean, cost no Gramian.

    :param rows: Number of objectives m.
    :param precision: The narrowest dtype that the rows of the Jacobian were rounded to. Near
        Pareto stationarity it decides which combinations of rows count as zero.
    :param device: Device of the Jacobian.
    :param compute: Makes the Gramian, a float64 Tensor [m, m] on any device. None where only the
        cross-Gramian is known.
    :param losses: Values of the objectives, Tensor [m], where the caller knows them.
    :param compute_cross: Makes the cross-Gramian ``J₁ J₂ᵀ`` of this Jacobian and that of a second,
        independent batch, a float64 Tensor [m, m] on any device. None where there is one batch.
    :param scale: Tells, once one of the two is there, by which power of two the rows were divided
        first: 1 unless the squares of their entries leave the range of float64. Weights that are
        homogeneous in the rows do without it.
    :param rounded_to: Tells, if asked, which dtype the rows were rounded to before they were
        converted to float64. Not asked where ``precision`` is another one.
    :param products: The dtype that the products of rows were made in or rounded to, which tells
        how exact the entries of the Gramian are.
    :param borrowed: Whether the Gramian is the tensor of a caller, who may overwrite it later.
    """

    rows: int
    precision: torch.dtype
    device: torch.device
    compute: Callable[[], Tensor] | None
    losses: Tensor | None = field(default=None, kw_only=True)
    compute_cross: Callable[[], Tensor] | None = field(default=None, kw_only=True)
    scale: Callable[[], float] = field(default=_one, kw_only=True)
    rounded_to: Callable[[], torch.dtype] | None = field(default=None, kw_only=True)
    products: torch.dtype = field(default=torch.float64, kw_only=True)
    borrowed: bool = field(default=False, kw_only=True)
    asked: bool = field(default=False, init=False)
    """Whether the method asked for the Gramian, so that its weights may depend on the Jacobian."""
    undo: list[Callable[[], None]] = field(factory=list, init=False)
    """What takes back the changes of state of methods that did not look at the Jacobian, for the
    caller to run if it turns out to hold NaN or infinite values."""
    finite: bool = field(default=False, init=False)
    """Whether the Gramian is known to be finite, once it was asked for."""
    _gramian: Tensor | None = field(default=None, init=False)
    _array: NDArray[np.float64] | None = field(default=None, init=False)

    def take_back(self) -> None:
        """
        Run :attr:`undo`, the last change first.

        Methods that did not look at the rows have stepped on, which a failed call must not leave
        behind.
        """
        for undo in reversed(self.undo):
            undo()

    @classmethod
    def of(cls, gramian: Tensor, losses: Tensor | None = None) -> GramianSource:
        """The source of a Gramian [m, m] that is there already; its dtype is its precision."""
        wide = without_graph(gramian).double()
        # Products of float32 may be as rough as those of TF32, and may be in float64 by now.
        tolerance = max(_ROUGH_PRODUCTS, 4.0 * torch.finfo(gramian.dtype).eps)
        return cls(
            *(len(gramian), gramian.dtype, gramian.device, partial(_checked, wide, tolerance)),
            losses=check_losses(losses, len(gramian)),
            products=gramian.dtype,
            borrowed=gramian.dtype == torch.float64,  # then the conversion copies nothing
        )

    @classmethod
    def of_cross(cls, cross_gramian: Tensor, losses: Tensor | None = None) -> GramianSource:
        """The source of a cross-Gramian [m, m] that is there already, without a Gramian."""
        wide = without_graph(cross_gramian).double()
        return cls(
            *(len(wide), cross_gramian.dtype, cross_gramian.device, None),
            losses=check_losses(losses, len(wide)),
            compute_cross=lambda: wide,
        )

    @staticmethod
    def of_columns(columns: Columns, losses: Tensor | None = None) -> GramianSource:
        """The source of a Jacobian that is there itself."""
        return ColumnsSource(columns, losses)

    @property
    def proximal_level(self) -> float:
        """What counts as rounding of the rows, see :func:`jdcore.linalg.proximal_level`."""
        known = self.precision
        if known == torch.float64 and self.rounded_to is not None:
            known = self.rounded_to()
        return proximal_level(self.rows, known, self.products)

    def definite(self, gramian: NDArray[np.float64]) -> NDArray[np.float64]:
        """
        A matrix that is the Gramian of some rows.

        :param gramian: That of this source, whose rounded products may be those of no rows.
        :returns: float64 array [m, m], with a proximal term where products are rounded.
        """
        rounded = self.products != torch.float64
        return add_proximal(gramian, self.proximal_level) if rounded else gramian

    def unit(self, degree: float) -> float:
        """What weights of a degree were divided by, as the rows were by :attr:`scale`."""
        return power(self.scale(), degree)

    def gramian(self) -> Tensor:
        """The Gramian, float64 Tensor [m, m], computed at the first call. Not to be modified."""
        self.asked = True
        return self.peek()

    def peek(self) -> Tensor:
        """:meth:`gramian` for an observer, which does not count as the method asking for it."""
        if self._gramian is None:
            if self.compute is None:
                raise ParameterError(
                    "gramian",
                    "the Gramian of one Jacobian",
                    "the cross-Gramian of two batches",
                    "Only methods that list cross_gramian as their input take that.",
                )
            self._gramian = self.compute()
        return self._gramian

    def as_made(self) -> Tensor | NDArray[np.float64]:
        """:meth:`peek`, or the array of a small Gramian, of which no Tensor was made yet."""
        return self.peek() if self._array is None else self._array

    def rounding_shows(self, weights: Tensor) -> bool:
        """Whether weights [m] need float64, see :func:`jdcore.linalg.rounding_shows`."""
        # Where the weights are is the Gramian, too, or was, if it is an accelerator's.
        here = weights.is_cpu or self.rows <= _COPIED
        return rounding_shows(weights, torch.from_numpy(self.array()) if here else self.gramian())

    def array(self) -> NDArray[np.float64]:
        """
        :meth:`gramian` on the host, float64 array [m, m]. Not to be modified.

        It is copied from an accelerator once, as the host waits for that.

        :raises ParameterError: See :func:`numbers_of`.
        """
        if self._array is None:
            self._array = numbers_of(self.gramian())
        self.asked = True
        return self._array

    def cross_gramian(self) -> Tensor:
        """
        The cross-Gramian, float64 Tensor [m, m], not symmetric. Not to be modified.

        :raises ParameterError: If there is one batch only.
        """
        if self.compute_cross is None:
            raise ParameterError(
                "second",
                "given: the method looks at the cross-Gramian of two independent batches",
                "nothing",
                "Call aggregator(jacobian, second=other_jacobian), jac_to_grad(..., "
                "second=other_jacobians), or weights = weighting(engine.cross_gramian(losses, "
                "other_losses)) and then losses.backward(weights).",
            )
        self.asked = True
        return self.compute_cross()

    def known_losses(self) -> Tensor:
        """
        The values of the objectives, Tensor [m] of any floating dtype on any device.

        :raises ParameterError: If the caller did not give them.
        """
        if self.losses is None:
            raise ParameterError(
                "losses",
                "given: the method looks at the values of the objectives",
                "nothing",
                "Call weighting(gramian, losses=losses), aggregator(jacobian, losses=losses), or "
                "jac_to_grad(..., losses=losses); gramian_backward and Engine.backward know them.",
            )
        return self.losses


class ColumnsSource(GramianSource):
    """
    The source of a Jacobian that is there itself.

    It is made at every step, and most methods ask for little of it: what can be told from the
    columns is not copied from there.
    """

    __slots__ = ("_columns",)

    products, borrowed = torch.float64, False

    def __init__(self, columns: Columns, losses: Tensor | None = None) -> None:
        blocks = columns.blocks
        self._columns, self.rows = columns, columns.rows
        self.precision = blocks[0].dtype if len(blocks) == 1 else columns.precision
        self.losses = None if losses is None else check_losses(losses, self.rows)
        self.asked = self.finite = False
        self.undo = []
        self._gramian = self._array = None

    # Attributes of the base can be set, these cannot.
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._columns.device

    @property
    def compute_cross(self) -> Callable[[], Tensor] | None:  # type: ignore[override]
        return None if self._columns.second is None else self._columns.cross_gramian

    def compute(self) -> Tensor:
        if self._array is not None:
            return torch.from_numpy(self._array)
        products = self._columns.products
        return self._columns.gramian() if products is None else products

    def array(self) -> NDArray[np.float64]:
        columns = self._columns
        # A few short rows take less time as arrays. Not of float64, whose squares may leave the
        # range; and columns on several processes need not have a block here yet.
        short = self._gramian is None and type(columns) is Columns
        if short and self._array is None and is_small(*columns.blocks, dtypes=_NARROW):
            columns.few, self._array, columns.length = small_gramian(*columns.blocks)
            self.finite = columns.length < math.inf
        self.asked = True
        return super().array() if self._array is None else self._array

    def rounding_shows(self, weights: Tensor) -> bool:
        columns = self._columns
        if columns.wide:
            return False
        # A cross-Gramian does not tell the lengths of the rows, which may cancel to any degree. And
        # who asked for neither has weights that do not depend on how the rows cancel.
        if columns.products is None:
            return columns.second is not None
        return super().rounding_shows(weights)

    def scale(self) -> float:
        return self._columns.scale

    def rounded_to(self) -> torch.dtype:
        return self._columns.rounded_to()


def numbers_of(gramian: Tensor) -> NDArray[np.float64]:
    """
    A matrix on the host, for methods that compute with numpy.

    :raises ParameterError: If it carries a tangent of forward-mode AD, which numpy does not follow.
    """
    gramian = gramian.cpu()
    refuse_tangents([gramian], "gramian")
    array: NDArray[np.float64] = gramian.numpy()
    return array


def check_losses(
    losses: Tensor | Sequence[Tensor] | None, m: int, parameter: str = "losses"
) -> Tensor | None:
    """
    The values of m objectives, detached.

    :param losses: None, a real Tensor with m entries, or m scalar tensors.
    :raises ParameterTypeError: If it is neither.
    :raises ParameterError: If there are not as many losses as objectives.
    """
    if losses is None:
        return None
    if isinstance(losses, (list, tuple)) and all(map(holds_real_numbers, losses)):
        losses = torch.cat(
            [loss.detach().flatten() for loss in losses] or [torch.empty(0, device="cpu")]
        )
    if not holds_real_numbers(losses) or losses.dtype not in FLOATS:
        raise ParameterTypeError(
            parameter, f"a floating Tensor with {m} entries", describe_tensor(losses)
        )
    if losses.numel() != m:
        raise ParameterError(
            parameter, f"{m} values, one for each objective", describe_tensor(losses)
        )
    return losses.detach().flatten()


def taken_by(call: Callable[..., Any], **known: Any) -> dict[str, Any]:
    """
    Which keyword arguments a call takes, of those that are known (not None).

    A training loop gives what it knows to any method; methods that do not look at it need not have
    the argument.
    """
    given = {name: value for name, value in known.items() if value is not None}
    if not given:
        return given
    # Not of the object itself: composed classes carry the signature of their constructor.
    routine = inspect.isroutine(call) or isinstance(call, partial)
    called: Any = call if routine else getattr(call, "forward", call.__call__)  # type: ignore[operator]
    parameters = inspect.signature(called).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in given.items() if takes_all or name in parameters}
