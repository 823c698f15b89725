"""The page of methods, made from the specs of the distributions of this repository."""

from __future__ import annotations

from jdcore import AggregatorSpec, Property, ScalarizerSpec, list_plugins

_DISTRIBUTIONS = {
    "jdplugins-standard": "The methods of the literature on several objectives",
    "jdplugins-robust": "Methods that withstand adversarial rows",
}

_INTRODUCTION = """\
# Methods

Any method is found by its name in any spelling,
`jdcore.get_aggregator("nash_mtl")`, and imported by its class, `from jdcore.aggregation import
NashMTL`; those that look at the Gramian also have a weighting, `NashMTLWeighting`, for autogram.

A tick is a promise that the conformance tests check.
"""

_SCALARIZERS = """\
## Scalarizers

What makes one loss of several, without any Jacobian, for a step at the price of gradient descent:
`jdcore.get_scalarizer("stch")(losses).backward()`, or `from jdcore.scalarization import STCH`.
Parameters of trainable ones go to the optimizer. `pip install jdplugins-standard`
"""

_COLUMNS = {
    Property.NON_CONFLICTING: "conflicts with no row",
    Property.LINEAR_UNDER_SCALING: "linear under scaling of rows",
    Property.STRONGLY_STATIONARY: "zero only at strongly stationary points",
    Property.PERMUTATION_INVARIANT: "order of rows is irrelevant",
    Property.SCALE_EQUIVARIANT: "scales with the matrix",
    Property.ROBUST: "withstands an adversarial row",
    Property.DIFFERENTIABLE: "differentiable",
}


def methods_page() -> str:
    """The page in Markdown."""
    parts = [_part(distribution, title) for distribution, title in _DISTRIBUTIONS.items()]
    return "\n".join([_INTRODUCTION, *parts, _SCALARIZERS, *_scalarizers()])


def _part(distribution: str, title: str) -> str:
    """The methods of one distribution, first in a table."""
    specs = sorted(
        (
            spec
            for plugin in list_plugins()
            if plugin.distribution == distribution
            for spec in plugin.aggregators
        ),
        key=lambda spec: spec.name,
    )
    head = [f"## {title}", "", f"`pip install {distribution}`", ""]
    return "\n".join([*head, *_table(specs), "", *map(_section, specs)])


def _table(specs: list[AggregatorSpec]) -> list[str]:
    head = ["name", *_COLUMNS.values()]
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(_cells(spec))} |" for spec in specs),
    ]


def _cells(spec: AggregatorSpec) -> list[str]:
    ticks = ["✓" if prop in spec.properties else "" for prop in _COLUMNS]
    return [f"[`{spec.name}`](#{spec.name.replace('_', '-')})", *ticks]


def _scalarizers() -> list[str]:
    specs = [spec for plugin in list_plugins() for spec in plugin.scalarizers]
    ordered = sorted(specs, key=lambda spec: spec.name)
    table = [
        "| name | class | scalar | needs |",
        "|---|---|---|---|",
        *(f"| {' | '.join(_scalarizer_cells(spec))} |" for spec in ordered),
        "",
    ]
    return table + [_scalarizer_section(spec) for spec in ordered]


def _scalarizer_cells(spec: ScalarizerSpec) -> list[str]:
    needs = ["an optimizer for its parameters"] if spec.trainable else []
    needs += [f"calls of `{spec.advanced_by}`"] if spec.advanced_by else []
    needs += ["positive losses"] if spec.positive else []
    return [f"`{spec.name}`", f"`{spec.class_name}`", spec.summary, ", ".join(needs)]


def _scalarizer_section(spec: ScalarizerSpec) -> str:
    return f"""\
### `{spec.class_name}`

```{{eval-rst}}
.. autoclass:: jdcore.scalarization.{spec.class_name}
```
"""


def _losses(spec: AggregatorSpec) -> str:
    return " and at the losses" if spec.losses else ""


def _section(spec: AggregatorSpec) -> str:
    seen = {"gramian": "Gramian", "cross_gramian": "cross-Gramian of two batches"}
    facts = ["Wraps another method."] if spec.wrapper else []
    facts += [f"Looks at the {seen.get(spec.input, 'matrix')}{_losses(spec)}."]
    facts += ["Stateful."] if spec.stateful else []
    facts += ["Stochastic."] if spec.stochastic else []
    facts += [f"Needs at least {spec.min_rows} rows."] if spec.min_rows > 1 else []
    return f"""\
({spec.name.replace("_", "-")})=
### `{spec.name}`

{spec.summary} {" ".join(facts)}

```{{eval-rst}}
.. autoclass:: jdcore.aggregation.{spec.class_name}
```
"""
