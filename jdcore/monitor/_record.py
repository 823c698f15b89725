from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation._observation import Observation, observing
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.monitor._change import first_order_change
from jdcore.monitor._history import History, Step
from jdcore.monitor._numbers import numbers_of
from jdcore.validators import boolean, describe_tensor, integer


@contextmanager
def record(
    *callbacks: Callable[[Step], object],
    every: int = 1,
    complete: bool = False,
    cosines_up_to: int = 16,
    optimizer: torch.optim.Optimizer | None = None,
    losses: Callable[[], Tensor] | None = None,
) -> Iterator[History]:
    """
    Record what every weighing inside of the block shows, whichever call asks for it.

    It hears ``jac_to_grad``, ``gramian_backward``, ``Engine.backward`` and direct calls of
    weightings and aggregators, in the thread that opened the block. The Gramian is there already,
    so a record costs little beside a step: the numbers are made when they are read, from copies of
    what a later step may overwrite. Weightings that are plain functions are heard through those
    calls, plain aggregators (functions of the Jacobian) are not.

    :param callbacks: Each is called with every new :class:`Step`: a writer such as
        :class:`TensorBoardWriter`, a :class:`ProgressLine`, or any function.
    :param every: Record one weighing in so many: with 10, every tenth one.
    :param complete: Whether to compute the Gramian for methods that need none, such as the mean.
        This costs as much as for a method that needs it.
    :param cosines_up_to: Number of objectives up to which all their cosines are kept.
    :param optimizer: With ``losses``: record what the actual step of this optimizer does to the
        losses. Momentum and Adam raise losses although the update conflicts with none.
    :param losses: Evaluates the losses of the current batch, see :func:`first_order_change`, which
        costs about three forward passes and two backward passes for each recorded step.
    :raises ParameterError: If an argument is unusable, or only one of the last two is given.

    >>> import torch
    >>> from jdcore import monitor
    >>> from jdcore.aggregation import UPGrad
    >>> with monitor.record() as history:
    ...     update = UPGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    >>> history[0].conflicting_pairs, history[0].conflicts
    (1.0, 0.0)
    """
    if (optimizer is None) != (losses is None):
        raise ParameterError(
            "losses", "given if and only if `optimizer` is", repr(losses), "Give both or neither."
        )
    if not (optimizer is None or hasattr(optimizer, "register_step_pre_hook")):
        raise ParameterTypeError("optimizer", "a torch.optim.Optimizer", repr(optimizer))
    if not (losses is None or callable(losses)):
        expected = "a function that evaluates the losses"
        raise ParameterTypeError("losses", expected, describe_tensor(losses))
    history = History(callbacks)
    recorder = _Recorder(history, every, complete, cosines_up_to, losses)
    handles: list[Any] = []
    if optimizer is not None:
        handles = [
            optimizer.register_step_pre_hook(recorder.before_step),
            optimizer.register_step_post_hook(recorder.after_step),
        ]
    try:
        # Handles are removed also if the training fails: the optimizer outlives the block.
        with observing(recorder.hear):
            yield history
        # The optimizer may not have stepped since the last weighing.
        recorder.flush()
    finally:
        for handle in handles:
            handle.remove()


@define(eq=False)
class _Recorder:
    history: History
    every: int = field(validator=integer(1))
    complete: bool = field(validator=boolean)
    cosines_up_to: int = field(validator=integer(0))
    losses: Callable[[], Tensor] | None
    heard: int = 0
    pending: Step | None = None
    before: dict[Tensor, Tensor] = field(factory=dict)

    def hear(self, observation: Observation) -> None:
        # Counted also where nothing is recorded, so that the index is that of the weighing.
        index, self.heard = self.heard, self.heard + 1
        if index % self.every:
            return
        # A step whose optimizer never came (a skipped one, say) is recorded without its change.
        self.flush()
        step = _examine(observation, index, self.complete, self.cosines_up_to)
        if self.losses is None:
            self.history.append(step)
        else:
            self.pending = step  # complete once the optimizer has made its step

    def flush(self) -> None:
        if self.pending is not None:
            step, self.pending = self.pending, None
            self.history.append(step)

    def before_step(
        self, optimizer: torch.optim.Optimizer, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        closure = given[0] if given else named.get("closure")
        # What a closure weighs in the course of the step belongs to it as well.
        if self.pending is not None or closure is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            # Copies, as optimizers step in place. The gradients may come with the closure.
            self.before = {
                p: p.detach().clone() for p in parameters if closure or p.grad is not None
            }

    def after_step(self, *_: Any) -> None:
        # An optimizer skips parameters without a gradient.
        before = {p: old for p, old in self.before.items() if p.grad is not None}
        # As large as the model: not kept until the next step.
        self.before = {}
        if self.pending is None or self.losses is None or not before:
            return
        step = {p: p.detach() - old for p, old in before.items()}
        change = first_order_change(self.losses, step, before=before)
        raised = float((change > 0).double().mean()) if change.numel() else 0.0
        self.pending.change, self.pending.raised = change.flatten().tolist(), raised
        self.flush()


def _examine(observation: Observation, index: int, complete: bool, cosines_up_to: int) -> Step:
    source, weights, update = observation.source, observation.weights, observation.update
    gramian = source.as_made() if source.asked or complete else None
    # Copies, as a user may write into the weights that a weighting gave out. On the CPU, a list is
    # made in less time than a tensor; on an accelerator, a list would wait for the values.
    kept = weights if weights is None else weights.tolist() if weights.is_cpu else weights.clone()
    if gramian is not None and source.borrowed:
        gramian = gramian.clone() if isinstance(gramian, Tensor) else gramian.copy()
    # After the Gramian, whose computation decides about the scale.
    scale, cosines = source.scale(), source.rows <= cosines_up_to
    told = None if gramian is None or update is None else update(scale)
    return Step(
        index=index,
        method=_name(observation.method),
        seconds=observation.seconds,
        seen=partial(numbers_of, kept, gramian, told, scale, cosines, observation.residuals),
        held=0 if cosines or gramian is None else 8 * source.rows**2,
    )


def _name(method: Any) -> str:
    inner = getattr(method, "weighting", method)  # of Flattening and other wrappers
    name = getattr(inner, "__name__", type(inner).__name__)
    return str(name).removesuffix("Weighting")
