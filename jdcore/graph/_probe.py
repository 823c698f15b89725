"""
Where the samples are, shown by NaN.

Some of the samples are poisoned: the backward pass starts with NaN at their losses, and with zero
at all others. NaN spreads exactly along the dependencies, whatever the magnitudes, also through
factors that happen to be zero and through tasks that cancel. Which samples are poisoned in which
pass makes a code of each sample. The codes are words of equal weight, none of which is covered by
another one or by several: so an entry that is NaN in just the passes of one code depends on this
sample alone.

Some functions of others treat NaN otherwise than numbers, and so hide where samples are: they
compare gradients, replace what is not finite or take another branch, as torch's own derivatives do
not. So passes of numbers follow those of NaN: from the second one on, each sample has another
factor, by which all that belongs to it has to grow. The factors are powers of two, which no
rounding hides: what a function mixes shows in the last digit of the smallest entry.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import combinations, islice
from math import comb

import torch
from attrs import frozen
from torch import Tensor

from jdcore._handles import own_hooks
from jdcore.graph._graph import Graph, Place
from jdcore.graph._layout import Layout
from jdcore.graph._operations import is_sparse_product, is_steady, spread
from jdcore.graph._passes import Grads, Heard, Listener, differentiate
from jdcore.graph._saved import current_pass, function_of
from jdcore.linalg._combine import sent


class Unshown(Exception):  # noqa: N818 - a signal, not an error
    """Where the samples are cannot be shown, for the reason that it is raised with."""


@frozen
class Findings:
    """
    What the passes showed.

    :param layouts: Where the samples are, at all places where they are apart.
    :param reached: Places at which gradients arrive that are not zero.
    :param sparse: Whether a product has a sparse factor, whose entries decide as well.
    :param spoilt: Whether gradients are NaN by themselves.
    """

    layouts: dict[Place, Layout]
    reached: set[Place]
    sparse: bool
    spoilt: bool


def find_layouts(graph: Graph, output: Tensor, batch_dim: int) -> Findings:
    """
    Show where the samples are.

    :param output: The losses, the only output of the graph.
    :param batch_dim: Their dimension of samples.
    :raises Unshown: If there are nested tensors between the losses and the parameters, or a
        function of others hides samples.
    """
    samples = output.shape[batch_dim]
    form = graph.form
    nodes = [n for n in form.upwards if n in form.leading and n not in form.rearranged]
    listener = Listener(graph, nodes)
    steady = [(n, hook) for n in nodes if (hook := spread(form.names[n], graph.nodes[n]))]
    seen: dict[Place, list[Tensor]] = {}
    sparse: list[int] = []
    shape = [-1 if d == batch_dim else 1 for d in range(output.ndim)]

    def poison(poisoned: Tensor, bit: int) -> None:
        def receive(heard: Iterator[Heard]) -> None:
            for node, grads, _ in heard:
                # Not after the pass, when a checkpoint would compute anew what the operations saved
                # that nothing lies behind.
                inside = bit == 0 and current_pass() >= 0
                if inside and is_sparse_product(form.names[node], graph.nodes[node]):
                    sparse.append(node)
                _note(seen, bit, node, grads)

        seed = torch.where(poisoned.view(shape), torch.nan, 0.0).to(output).expand_as(output)
        # Anomaly detection would take the poison for an error of the user.
        with torch.autograd.set_detect_anomaly(False):
            listener.run([output], [seed], receive, hooks=steady, retain_graph=True)

    # About log2 of the samples as many passes, in place of one for each sample.
    codes = _codes(samples)
    words = sent(torch.tensor(codes, device="cpu"), output.device)
    for bit in range(max(codes).bit_length()):
        poison((words >> bit) & 1 == 1, bit)
    sample_of = {code: sample for sample, code in enumerate(codes)}
    everything = (1 << max(codes).bit_length()) - 1
    found = _read(seen)
    if everything in _words(found):
        poison(torch.zeros(samples, dtype=torch.bool, device=output.device), _BY_ITSELF)
        found = _read(seen)
    spoilt = any(word >> _BY_ITSELF for word in _words(found))
    start = form.starts[0]
    layouts = {start: Layout(batch_dim, samples)}
    for place, of_dims in found.items():
        # A number has no dimension that samples could lie along.
        layout = _layout(of_dims, sample_of, samples) if form.result(place).shape else None
        if layout is not None and place != start:
            layouts[place] = layout
    reached = {place for place, dims in found.items() if any(map(any, dims))}
    layouts = _whole(layouts, found)
    if _functions_hide(graph, output, batch_dim, layouts, reached):
        raise Unshown("a function of the graph treats NaN otherwise than numbers")
    return Findings(layouts, reached, bool(sparse), spoilt)


# The highest bit of an int64 beside its sign: no code is that long.
_BY_ITSELF = 62


def _note(seen: dict[Place, list[Tensor]], bit: int, node: int, grads: Grads) -> None:
    for number, grad in enumerate(grads):
        if grad is None:
            continue
        if grad.is_nested:
            raise Unshown("samples lie in nested tensors")  # without dimensions to look in
        # Gradients of tables may be sparse, and such tensors have no `any` by dimension.
        bad = torch.isnan(grad.detach().to_dense())
        bad = bad if bad.ndim else bad[None]  # a number is reached as well
        hit = []
        for dim in range(bad.ndim):
            others = [d for d in range(bad.ndim) if d != dim]
            hit.append((bad.any(others) if others else bad).to(torch.int64) << bit)
        known = seen.get((node, number))
        seen[node, number] = (
            hit if known is None else [a | b for a, b in zip(known, hit, strict=True)]
        )


def _read(seen: dict[Place, list[Tensor]]) -> dict[Place, list[list[int]]]:
    """The word of each entry, by place and dimension."""
    hits = [hit for of_dims in seen.values() for hit in of_dims]
    # One transfer for all of them, as each one would wait for an accelerator.
    words = iter(torch.cat([hit.to(hits[0].device) for hit in hits]).tolist() if hits else ())
    return {
        place: [list(islice(words, len(hit))) for hit in of_dims] for place, of_dims in seen.items()
    }


def _words(found: dict[Place, list[list[int]]]) -> set[int]:
    return {word for of_dims in found.values() for words in of_dims for word in words}


def _layout(of_dims: Sequence[list[int]], sample_of: dict[int, int], samples: int) -> Layout | None:
    irregular = None
    for dim, words in enumerate(of_dims):
        # A word that is no code (-2) is that of an entry on which several samples depend.
        owners = [-1 if w == 0 or w >> _BY_ITSELF else sample_of.get(w, -2) for w in words]
        if -2 in owners:
            continue
        layout = Layout.of_owners(dim, owners, samples)
        if layout is not None and layout.index is None:
            return layout
        if layout is not None and not any(w >> _BY_ITSELF for w in words):
            irregular = irregular or layout
    return irregular


def _whole(
    layouts: dict[Place, Layout], found: dict[Place, list[list[int]]]
) -> dict[Place, Layout]:
    """Without those nodes some of whose results are used and do not keep the samples apart."""
    mixed = {
        node
        for (node, number), of_dims in found.items()
        if (node, number) not in layouts and any(any(words) for words in of_dims)
    }
    return {place: layout for place, layout in layouts.items() if place[0] not in mixed}


@cache
def _codes(samples: int) -> list[int]:
    """Words with as many ones as zeros (or one less), one for each sample."""
    length = next(n for n in range(2, 64) if comb(n, n // 2) >= samples)
    words = combinations(range(length), length // 2)
    return [sum(1 << bit for bit in word) for word, _ in zip(words, range(samples), strict=False)]


# -- functions of others --------------------------------------------------------------------------


def _functions_hide(
    graph: Graph,
    output: Tensor,
    batch_dim: int,
    layouts: Mapping[Place, Layout],
    reached: Collection[Place],
) -> bool:
    """
    Whether a function of others does something else with numbers than with NaN.

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
    seed = _seed(output, batch_dim)
    first = _returned(graph, output, seed, functions)
    apart = {node for node, _ in layouts}
    known: dict[Place, Layout] = {}
    for (node, operand), grad in first.items():
        place = form.inputs[node][operand]
        if place in layouts:
            known[node, operand] = layouts[place]
            continue
        inside = place[0] in form.leading and place[0] not in form.rearranged
        # Where samples are not apart, what is zero for all together may not be so for one.
        if inside and place not in reached and (node not in apart or bool(grad.any())):
            return True
    # In half precision, factors that are far apart leave the range of numbers.
    half, limits = form.precision == torch.float16, torch.finfo(form.precision)
    samples, doubtful = output.shape[batch_dim], False
    for factors in [_random(samples)] if half else _powers(samples):
        of_losses = factors.view(-1, *[1] * (output.ndim - batch_dim - 1)).to(output)
        second = _returned(graph, output, seed * of_losses, functions)
        if second.keys() != first.keys():
            return True
        for place, layout in known.items():
            wrong, largest = _errors(first[place], second[place], layout, factors)
            # What is not finite cannot be told.
            if bool((wrong > torch.finfo(second[place].dtype).eps ** 0.5 * largest).any()):
                return True
            # The smallest numbers have fewer digits, which a factor brings back.
            doubtful |= not half and bool((wrong > limits.tiny / limits.eps).any())
    # Accelerators have operations that add in no fixed order: their last digits differ as well.
    return doubtful and _equal(first, _returned(graph, output, seed, functions))


def _seed(output: Tensor, batch_dim: int) -> Tensor:
    """What the losses start with."""
    # One task starts as it will in the pass that counts; of several ones, none cancels another.
    samples = output.shape[batch_dim]
    tasks = _random(output.numel() // samples).view(-1, 1).to(output)
    others = output.shape[:batch_dim] + output.shape[batch_dim + 1 :]
    seed = (tasks / tasks[0]).expand(-1, samples)
    return seed.reshape(*others, samples).movedim(-1, batch_dim)


def _random(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, dtype=torch.float64, generator=generator, device="cpu") + 0.5


def _powers(samples: int) -> Iterator[Tensor]:
    """Powers of two for each sample, for as many passes as no two samples have the same in all."""
    numbers = torch.arange(samples, device="cpu")
    while True:
        yield torch.exp2((numbers % 8).double() - 3)
        numbers = numbers // 8
        if not numbers.any():
            return


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
        differentiate([output], graph.edges(graph.form.targets), [seed], True)
    return kept


def _errors(grad: Tensor, grown: Tensor, layout: Layout, factors: Tensor) -> tuple[Tensor, Tensor]:
    """
    What is missing for a gradient to have grown as it has to, and the largest entry of each sample.

    What belongs to a sample has to grow by its factor, and what belongs to none to be zero.
    """
    owners = layout.owners(grad.shape[layout.dim], grad.device)
    of_entries = torch.where(owners < 0, 0.0, factors.to(grad.device)[owners])
    wrong = (grown - grad * of_entries.view(-1, *[1] * (grad.ndim - layout.dim - 1))).abs()
    others = [d for d in range(grad.ndim) if d != layout.dim]
    largest = grown.abs()
    if others:  # of no dimensions, torch takes all
        largest = largest.amax(others, keepdim=True)
    return wrong, largest


def _equal(found: Mapping[Place, Tensor], again: Mapping[Place, Tensor]) -> bool:
    same = partial(torch.allclose, rtol=0.0, atol=0.0, equal_nan=True)
    return found.keys() == again.keys() and all(same(found[p], again[p]) for p in found)
