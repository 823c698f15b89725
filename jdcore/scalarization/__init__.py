"""
One loss of several, without a Jacobian: the base classes, and the door to every scalarizer.

A training step with a scalarizer is an ordinary one::

    scalarizer = jdcore.get_scalarizer("stch")
    scalarizer(losses).backward()

Any registered scalarizer can be imported from here by its class name, e.g. ``from
jdcore.scalarization import FAMO``; :func:`jdcore.get_scalarizer` instantiates the same classes.
The parameters of trainable ones belong to the optimizer, and what else a training loop has to call
is in their docstrings.
"""

from typing import Any

from jdcore._discovery import SCALARIZER as _KIND
from jdcore.scalarization._base import LossScalarizer, TrainableScalarizer, WeightedSum
from jdcore.scalarization._losses import check_losses, require_above

__all__ = [
    "LossScalarizer",
    "TrainableScalarizer",
    "WeightedSum",
    "check_losses",
    "require_above",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jdcore._methods import exported_class  # on demand: it stands above this package

    return exported_class(_KIND, name)


def __dir__() -> list[str]:
    from jdcore._methods import exported_names

    return sorted({*__all__, *exported_names(_KIND)})
