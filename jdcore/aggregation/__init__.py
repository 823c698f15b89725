"""
What all methods share, and the door to every installed method.

Any registered method can be imported from here by its class name, e.g. ``from jdcore.aggregation
import UPGrad, UPGradWeighting``; these are the classes that :func:`jdcore.get_aggregator` and
:func:`jdcore.get_weighting` instantiate.
"""

from typing import Any

from jdcore._compilation import not_traced
from jdcore._discovery import AGGREGATOR as _KIND
from jdcore._modes import without_graph
from jdcore.aggregation._aggregator import GramianAggregator
from jdcore.aggregation._any import vectors_of
from jdcore.aggregation._columns import Columns
from jdcore.aggregation._coordinatewise import CoordinatewiseAggregator, portions
from jdcore.aggregation._differentiation import forbid_differentiation
from jdcore.aggregation._finite import finite_required
from jdcore.aggregation._flattening import Flattening
from jdcore.aggregation._history import HistoryAggregator
from jdcore.aggregation._informed import CrossGramianWeighting, LossWeighting
from jdcore.aggregation._informed_aggregator import InformedAggregator
from jdcore.aggregation._matrix_aggregator import MatrixAggregator
from jdcore.aggregation._mixing import (
    RowMixing,
    aggregator_validator,
    finite_gramian,
    row_lengths,
)
from jdcore.aggregation._module import as_module
from jdcore.aggregation._nested_state import NestedState, stateful_part
from jdcore.aggregation._observation import report_residual
from jdcore.aggregation._scalarization import ScalarizationWeighting, equal_weights
from jdcore.aggregation._solver import find_solver, solution, solver_field
from jdcore.aggregation._source import GramianSource, taken_by
from jdcore.aggregation._state import StateFields, state_field
from jdcore.aggregation._weigh import as_weighting, weigh
from jdcore.aggregation._weighting import GramianWeighting, row_weights
from jdcore.aggregation._wrapping import WeightingWrapper
from jdcore.protocols import Aggregator, GeneralizedWeighting, Weighting

__all__ = [
    "Aggregator",
    "Columns",
    "CoordinatewiseAggregator",
    "CrossGramianWeighting",
    "Flattening",
    "GeneralizedWeighting",
    "GramianAggregator",
    "GramianSource",
    "GramianWeighting",
    "HistoryAggregator",
    "InformedAggregator",
    "LossWeighting",
    "MatrixAggregator",
    "NestedState",
    "RowMixing",
    "ScalarizationWeighting",
    "StateFields",
    "Weighting",
    "WeightingWrapper",
    "aggregator_validator",
    "as_module",
    "as_weighting",
    "equal_weights",
    "find_solver",
    "finite_gramian",
    "finite_required",
    "forbid_differentiation",
    "not_traced",
    "portions",
    "report_residual",
    "row_lengths",
    "row_weights",
    "solution",
    "solver_field",
    "state_field",
    "stateful_part",
    "taken_by",
    "vectors_of",
    "weigh",
    "without_graph",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jdcore._methods import exported_class  # on demand: it stands above this package

    return exported_class(_KIND, name)


def __dir__() -> list[str]:
    from jdcore._methods import exported_names

    return sorted({*__all__, *exported_names(_KIND)})
