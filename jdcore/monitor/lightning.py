"""A callback for Lightning; importing it needs ``lightning``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback

from jdcore.monitor._history import History, Step, scalars
from jdcore.monitor._record import record

__all__ = ["MonitorCallback"]


class MonitorCallback(Callback):  # type: ignore[misc]  # untyped where it is not installed
    """
    Records a training of Lightning and logs it with ``self.log_dict``, as any other metric.

    :param options: As for :func:`jdcore.monitor.record`: ``every``, ``complete``,
        ``cosines_up_to``.

    The steps are in ``.history`` during and after the training.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.history = History()
        # A training begins and ends in different calls: no `with` statement spans it.
        self._stack = ExitStack()
        self._latest: Step | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record."""
        del trainer, pl_module
        self.history = self._stack.enter_context(record(self._keep, **self.options))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log what the batch showed, if a weighing was recorded."""
        del trainer
        if self._latest is not None:
            pl_module.log_dict(scalars(self._latest))
            # So that a batch without a step, as under gradient accumulation, does not log the last
            # one again.
            self._latest = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop recording."""
        del trainer, pl_module
        self._stack.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop recording."""
        # `on_train_end` is not called then, and the record would hear the next training as well.
        del trainer, pl_module, exception
        self._stack.close()

    def _keep(self, step: Step) -> None:
        self._latest = step
