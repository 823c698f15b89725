"""
Functions of Python that treat NaN otherwise than numbers, and so hide where samples are.

Their code may compare gradients, replace what is not finite or take another branch, as torch's own
derivatives do not. So two passes of numbers follow those of NaN: in the second one each sample has
another factor, by which all that belongs to it has to grow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from jdcore._handles import own_hooks
from jdcore.graph._form import Place
from jdcore.graph._graph import Graph
from jdcore.graph._layout import Layout
from jdcore.graph._operations import is_steady
from jdcore.graph._passes import Grads, differentiate
from jdcore.graph._saved import function_of


def hides_samples(
    graph: Graph,
    output: Tensor,
    batch_dim: int,
    layouts: Mapping[Place, Layout],
    reached: Collection[Place],
) -> bool:
    """
    Whether a function of Python does something else with numbers than with NaN.

    :param output: The losses, the only output of the graph.
    :param batch_dim: Their dimension of samples.
    :param layouts: Where NaN showed the samples.
    :param reached: The places that NaN came to.
    """
    form = graph.form
    functions = [
        node
        for node in (form.leading if form.has_functions else ())
        if function_of(graph.nodes[node]) and not is_steady(form.names[node])
    ]
    if not functions:
        return False
    samples = output.shape[batch_dim]
    factors = _factors(samples)
    of_losses = factors.view(-1, *[1] * (output.ndim - batch_dim - 1)).to(output)
    # One task starts as it will in the pass that counts; of several ones, none cancels another.
    tasks = _factors(output.numel() // samples).view(-1, 1).to(output)
    others = output.shape[:batch_dim] + output.shape[batch_dim + 1 :]
    seed = (tasks / tasks[0]).expand(-1, samples).reshape(*others, samples).movedim(-1, batch_dim)
    apart = {node for node, _ in layouts}
    first, second = (_returned(graph, output, s, functions) for s in (seed, seed * of_losses))
    for (node, operand), grad in first.items():
        place = form.inputs[node][operand]
        layout = layouts.get(place)
        if layout is None:
            inside = place[0] in form.leading and place[0] not in form.rearranged
            # Where samples are not apart, what is zero for all together may not be so for one.
            if inside and place not in reached and (node not in apart or bool(grad.any())):
                return True
        elif not _has_grown(grad, second[node, operand], layout, factors):
            return True
    return False


def _factors(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, dtype=torch.float64, generator=generator, device="cpu") + 0.5


def _returned(
    graph: Graph, output: Tensor, seed: Tensor, functions: Collection[int]
) -> dict[Place, Tensor]:
    """The gradients that functions return in a pass, by function and operand."""
    kept: dict[Place, Tensor] = {}

    def keep(node: int, found: Grads, _: Grads) -> None:
        for operand, grad in enumerate(found):
            if grad is not None and not grad.is_nested:
                kept[node, operand] = grad.detach().to_dense().clone()

    hooks = (graph.nodes[node].register_hook(partial(keep, node)) for node in functions)
    with own_hooks(hooks):
        differentiate([output], [graph.edge(p) for p in graph.form.targets], [seed], True)
    return kept


def _has_grown(grad: Tensor, grown: Tensor, layout: Layout, factors: Tensor) -> bool:
    """Whether what belongs to a sample grew by its factor, and what belongs to none is zero."""
    owners = layout.owners(grad.shape[layout.dim], grad.device)
    of_entries = torch.where(owners < 0, 0.0, factors.to(grad.device)[owners])
    wrong = (grown - grad * of_entries.view(-1, *[1] * (grad.ndim - layout.dim - 1))).abs()
    others = [d for d in range(grad.ndim) if d != layout.dim]
    largest = grown.abs()
    if others:  # of no dimensions, torch takes all
        largest = largest.amax(others, keepdim=True)
    # What is not finite cannot be told.
    return not bool((wrong > torch.finfo(grad.dtype).eps ** 0.5 * largest).any())
