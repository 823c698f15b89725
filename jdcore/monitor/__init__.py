"""
What the steps of a training showed: weights, conflicts, alignment, the time that they took.

Watch any loop, whichever call makes its updates::

    with monitor.record() as history:
        train()
    print(history)
    history.frame()  # with pandas
"""

from jdcore.monitor._change import first_order_change
from jdcore.monitor._history import History, Step, scalars
from jdcore.monitor._record import record
from jdcore.monitor._writers import LoggerWriter, ProgressLine, TensorBoardWriter

__all__ = [
    "History",
    "LoggerWriter",
    "ProgressLine",
    "Step",
    "TensorBoardWriter",
    "first_order_change",
    "record",
    "scalars",
]
