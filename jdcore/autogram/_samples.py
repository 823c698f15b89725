"""Where the samples are at each place of the graph that gradients are taken at."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jdcore.autogram._call import check_batch
from jdcore.autogram._passes import Objectives, gradients
from jdcore.autogram._probe import Finding, find_layout, probe_weights
from jdcore.autogram._survey import Site, Survey
from jdcore.autogram.rules._direct import Place
from jdcore.errors import ParameterError

Places = Mapping[Place, Site | None]


def kind_of(objectives: Objectives, found: Survey, places: Places) -> Hashable:
    """What decides where samples are, but for sizes: these change from batch to batch."""
    B = objectives.samples
    calls = tuple((id(s.record.served), s.record.training) for s in found.sites.values())
    shapes = [(node.name(), _shape_at(node, output)) for node, output in places]
    # A dimension that holds just the samples looks the same in several layouts.
    forms = tuple((name, len(s), tuple(d == B for d in s[:2])) for name, s in shapes)
    # Other operations may mix samples where those seen before did not.
    return calls, forms, frozenset(found.operations), objectives.output.ndim


def probe_pass(objectives: Objectives, inputs: Sequence[Any]) -> list[Tensor | None]:
    """Gradients of the losses, weighted with :func:`probe_weights`."""
    weights = probe_weights(objectives.samples).to(objectives.output)
    by_task = weights.expand(objectives.tasks, -1)
    return gradients(objectives, list(inputs), by_task, retain_graph=True) if inputs else []


def findings_of(
    objectives: Objectives,
    places: Places,
    captured: Sequence[Tensor | None],
    probed: Sequence[Tensor | None],
) -> list[Finding]:
    """
    Find out at each place.

    :param captured: Gradients of the losses there, by task.
    :param probed: Those of :func:`probe_pass`.
    :raises ParameterError: If a layer with a rule does not have samples first.
    """
    weights = probe_weights(objectives.samples)
    findings: list[Finding] = []
    for site, grads, of_place in zip(places.values(), captured, probed, strict=False):
        found = Finding("major", sure=True)
        if grads is not None and of_place is not None:
            found = find_layout(grads.sum(0), of_place, weights)
            if site is not None and site.record.served.rule is not None:
                # Layers with a rule have samples first, so nothing else needs to be excluded.
                if found.layout != "major":
                    _refuse_mixing(site.record.served.label, grads.shape[1:], len(weights))
            elif found.ambiguous:
                found = Finding(None, sure=False)
        findings.append(found)
    return findings


def _shape_at(node: Any, output: int) -> torch.Size:
    """Shape of one result of an operation."""
    shape: torch.Size = node._input_metadata[output].shape
    return shape


def _refuse_mixing(name: str, shape: torch.Size, samples: int) -> None:
    check_batch(name, shape[0] if shape else 1, samples)
    raise ParameterError(
        "batch_dim",
        "given only if each loss depends on one sample, and layers have samples first",
        f"samples that mix at the output of `{name}`, of shape {list(shape)}",
        "Use batch_first=True, keep the order of samples when dimensions are folded, expand the "
        "indices of tables of positions to all samples, avoid statistics of the batch, or use "
        "batch_dim=None.",
    )
