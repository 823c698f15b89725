"""
jdcore: Jacobian descent for PyTorch.

Instead of the gradient of one loss, a training step takes the Jacobian of several losses and
aggregates its rows into one update that hurts none of them.
"""

from typing import TYPE_CHECKING, Any

from jdcore.config import to_config
from jdcore.errors import (
    AmbiguousNameError,
    GraphError,
    JDCoreError,
    JDCoreWarning,
    MissingMethodError,
    MissingPackageError,
    NonDifferentiableError,
    NonFiniteError,
    ParameterError,
    ParameterTypeError,
    PeerError,
    PluginError,
    PluginWarning,
    RowByRowWarning,
    SinglePassError,
    TransformError,
    UnknownNameError,
    UnservedGraphError,
    UnsolvedWarning,
    VectorizationError,
    VectorizationWarning,
)
from jdcore.hooks import hookimpl
from jdcore.protocols import (
    Aggregator,
    BlockwiseAggregator,
    GeneralizedWeighting,
    Scalarizer,
    Stateful,
    Weighting,
)
from jdcore.registry import (
    describe,
    describe_scalarizer,
    get_solver,
    list_aggregators,
    list_plugins,
    list_scalarizers,
    list_solvers,
    refresh,
    register,
)
from jdcore.spec import (
    AggregatorSpec,
    GramianRuleSpec,
    Property,
    Reference,
    ScalarizerSpec,
    SolverSpec,
)

if TYPE_CHECKING:  # the same functions, with the signature of each method that is known
    from jdcore._typed import get_aggregator, get_scalarizer, get_weighting
else:
    from jdcore.registry import get_aggregator, get_scalarizer, get_weighting

__all__ = [
    "Aggregator",
    "AggregatorSpec",
    "AmbiguousNameError",
    "BlockwiseAggregator",
    "GeneralizedWeighting",
    "GramianRuleSpec",
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
    "Property",
    "Reference",
    "RowByRowWarning",
    "Scalarizer",
    "ScalarizerSpec",
    "SinglePassError",
    "SolverSpec",
    "Stateful",
    "TransformError",
    "UnknownNameError",
    "UnservedGraphError",
    "UnsolvedWarning",
    "VectorizationError",
    "VectorizationWarning",
    "Weighting",
    "describe",
    "describe_scalarizer",
    "get_aggregator",
    "get_scalarizer",
    "get_solver",
    "get_weighting",
    "hookimpl",
    "list_aggregators",
    "list_plugins",
    "list_scalarizers",
    "list_solvers",
    "refresh",
    "register",
    "to_config",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # On demand, as it reads the metadata of the distribution.
        from importlib.metadata import version

        return version("jdcore")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
