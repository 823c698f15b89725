"""
The hooks a plugin implements.

A plugin is a module (or object) named by an entry point of the group ``jdcore.plugins``::

    [project.entry-points."jdcore.plugins"]
    my-methods = "my_methods.plugin"

It implements any of the hooks below with :data:`hookimpl`. Hooks only *describe*: keep torch and
solvers out of the plugin module, so that listing stays fast.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from jdcore.spec import AggregatorSpec, GramianRuleSpec, ScalarizerSpec, SolverSpec

__all__ = [
    "ENTRY_POINT_GROUP",
    "hookimpl",
    "jdcore_aggregators",
    "jdcore_gramian_rules",
    "jdcore_scalarizers",
    "jdcore_solvers",
]

ENTRY_POINT_GROUP = "jdcore.plugins"
"""The group of entry points that plugins are found by."""

hookspec = pluggy.HookspecMarker("jdcore")
hookimpl = pluggy.HookimplMarker("jdcore")
"""Decorator that marks a function of a plugin as the implementation of the hook of that name."""


@hookspec
def jdcore_aggregators() -> Iterable[AggregatorSpec]:  # type: ignore[empty-body]
    """
    Yield one spec per aggregation method.

    Example::

        from jdcore import AggregatorSpec, hookimpl

        @hookimpl
        def jdcore_aggregators():
            yield AggregatorSpec(
                name="norm_mean",
                summary="Mean of the rows after scaling each to unit norm.",
                weighting="my_methods.norm_mean:NormMeanWeighting",
                api_version=1,
            )
    """


@hookspec
def jdcore_scalarizers() -> Iterable[ScalarizerSpec]:  # type: ignore[empty-body]
    """
    Yield one spec per scalarizer: what makes one loss of several, without a Jacobian.

    Example::

        from jdcore import ScalarizerSpec, hookimpl

        @hookimpl
        def jdcore_scalarizers():
            yield ScalarizerSpec(
                name="largest",
                summary="The largest loss.",
                scalarizer="my_methods.largest:Largest",
                api_version=1,
            )
    """


@hookspec
def jdcore_solvers() -> Iterable[SolverSpec]:  # type: ignore[empty-body]
    """
    Yield one spec per solver backend.

    Example::

        from jdcore import SolverSpec, hookimpl

        @hookimpl
        def jdcore_solvers():
            yield SolverSpec(
                name="bisection",
                problem="dual_cone",
                summary="Bisection, for teaching only.",
                factory="my_methods.bisection:BisectionSolver",
                api_version=1,
            )
    """


@hookspec
def jdcore_gramian_rules() -> Iterable[GramianRuleSpec]:  # type: ignore[empty-body]
    """
    Yield one spec per operation for which the plugin knows a closed form of the Jacobian.

    Example::

        from jdcore import GramianRuleSpec, hookimpl

        @hookimpl
        def jdcore_gramian_rules():
            yield GramianRuleSpec(
                name="layer_scale",
                operation="my_layers.scale:LayerScaleFunction",
                rule="my_layers.gramian:layer_scale",
                summary="Sums of the input times the gradient at the result.",
                api_version=1,
            )
    """
