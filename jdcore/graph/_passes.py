from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from jdcore._fields import dense
from jdcore._handles import own_hooks
from jdcore.errors import SinglePassError
from jdcore.graph._graph import Form, Graph, Place, once_for_each_form
from jdcore.graph._nesting import OuterPass
from jdcore.graph._saved import all_saved

Grads = Sequence["Tensor | None"]

Heard: TypeAlias = "tuple[int, Grads, Mapping[str, Any]]"
"""A node, the gradients at its results, and what it saved if the pass may have freed that."""

Receive = Callable[[Iterator[Heard]], None]

_NONE: Mapping[Any, Any] = {}
_CPU = torch.device("cpu")

Item = TypeVar("Item")


@once_for_each_form
def _stops(form: Form, heard: frozenset[int]) -> tuple[list[int], list[Place]]:
    """Those of some nodes that need a hook, and of the others the results to ask for."""
    inner = form.above(heard) & heard  # other ones lie behind them
    ends = heard - inner
    # A result that nothing uses may not even exist, so those in use are asked for.
    return sorted(inner), [place for place in form.used if place[0] in ends]


class Listener:
    """
    Backward passes that hand on the gradients at the results of chosen nodes.

    Nodes are heard by prehooks, which see what the hooks of tensors made of a gradient. Autograd
    does not run the deepest nodes, as nothing behind them is asked for; it returns the gradients
    there. Passes that start inside of the pass (of implicit layers, of checkpoints) are not heard.

    Code of Python in the midst of a pass drives that of torch from the caches of the processor. So
    gradients may be handed on later, those of several nodes at a time.

    :param graph: The graph.
    :param heard: The nodes.
    :param late: Those of them that may be handed on late, with the entries of their results.
    :param room: How many entries may wait.
    """

    def __init__(
        self, graph: Graph, heard: Iterable[int], *, late: Mapping[int, int] = _NONE, room: int = 0
    ) -> None:
        self._graph, self._late, self._room = graph, late, room
        self._inner, self._ends = _stops(graph.form, frozenset(heard))

    def run(
        self,
        outputs: Sequence[Tensor],
        seeds: Sequence[Tensor],
        receive: Receive,
        *,
        hooks: Collection[tuple[int, Callable[..., Any]]] = (),
        retain_graph: bool,
    ) -> None:
        """
        Run one pass.

        :param outputs: Where it starts.
        :param seeds: With which gradients.
        :param receive: Called with those nodes that have gradients, some at a time. May raise.
        :param hooks: Further hooks of nodes, for this pass.
        """
        graph, own, context = self._graph, OuterPass(), copy_context()
        stream = _Stream.current(graph)
        waiting: deque[Heard] = deque()
        free = self._room

        def hand_on() -> None:
            nonlocal free
            free = self._room
            receive(_taken(waiting))

        def hear(node: int, grads: Grads) -> None:
            nonlocal free
            if not own.is_running():
                return
            free -= self._late.get(node, free + 1)
            other = stream and stream.other()
            tensors = all_saved(graph.nodes[node]) if free >= 0 and not other else None
            waiting.append((node, grads, tensors or {}))
            if stream and other:
                with stream.following(other):
                    context.copy().run(hand_on)
            elif tensors is None:
                # Threads of autograd, of which each accelerator has one, know nothing of variables
                # that were set here, such as that products are to be made in float64.
                context.copy().run(hand_on)

        ends = graph.edges(self._ends)
        heard = (graph.nodes[node].register_prehook(partial(hear, node)) for node in self._inner)
        others = (graph.nodes[node].register_hook(hook) for node, hook in hooks)
        # That of the pass first of all, since its start may be heard itself.
        with own.starting_at(outputs if self._inner else ()), own_hooks(chain(heard, others)):
            found = differentiate(outputs, ends, seeds, retain_graph)
        hand_on()
        of_node: dict[int, list[Tensor | None]] = {}
        for (node, number), grad in zip(self._ends, found, strict=True):
            if grad is not None:
                nothing: list[Tensor | None] = [None] * len(graph.form.results[node])
                of_node.setdefault(node, nothing)[number] = grad
        # From here on, each gradient is freed as soon as its receiver is done with it.
        del found
        receive((n, of_node.pop(n), _NONE) for n in list(of_node))


@frozen
class _Stream:
    """
    The stream of an accelerator on which all shares are computed.

    Autograd calls hooks on the stream on which the forward pass called the operation. Where that
    had several ones, their hooks would add up shares at the same time.
    """

    own: torch.Stream

    @classmethod
    def current(cls, graph: Graph) -> _Stream | None:
        """That of the caller, if the parameters are on an accelerator."""
        device = next((t.device for t in graph.targets.values()), _CPU)
        return None if device.type == "cpu" else cls(torch.accelerator.current_stream(device))

    def other(self) -> torch.Stream | None:
        """The stream of this thread, if it is another one."""
        stream = torch.accelerator.current_stream(self.own.device)
        return None if stream == self.own else stream

    @contextmanager
    def following(self, other: torch.Stream) -> Iterator[None]:
        """Compute on this stream what goes on from another one."""
        self.own.wait_stream(other)  # which makes the gradients
        with self.own:
            yield
        other.wait_stream(self.own)  # before it uses their memory anew


def _taken(waiting: deque[Item]) -> Iterator[Item]:
    """Take out all that waits, also where several threads of autograd do so."""
    try:
        while True:
            yield waiting.popleft()
    except IndexError:
        return


def differentiate(
    outputs: Sequence[Any], inputs: Sequence[Any], seeds: Sequence[Tensor], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """
    ``torch.autograd.grad``, with an error of ours where a compiled function refuses.

    :param outputs: Tensors, or edges of the graph.
    :param inputs: Likewise.
    """
    if not inputs:
        return ()
    try:
        # What `torch.autograd.grad` comes down to: its questions take longer than small operations.
        found: tuple[Tensor | None, ...] = _engine_run_backward(
            tuple(outputs),
            *(tuple(seeds), retain_graph, False, tuple(inputs), True),
            accumulate_grad=False,
        )
    except RuntimeError as error:
        explain_single_pass(error)
        raise
    return found


def explain_single_pass(error: RuntimeError) -> None:
    """
    Say what to do where a compiled graph allows one pass only.

    :param error: That of torch, which has no class of its own for these errors: their texts tell.
    :raises SinglePassError: If it is one of them.
    """
    if "under selective activation checkpoint" in str(error):
        raise SinglePassError(
            "a selective checkpoint hands out what it kept once",
            "Call torch.utils.checkpoint.checkpoint without `context_fn`.",
        ) from error
    if "donated buffers" in str(error):
        raise SinglePassError(
            "a compiled region reuses the memory of what it saved (donated buffers)",
            "Set torch._functorch.config.donated_buffer = False before the first backward pass of "
            "the compiled region.",
        ) from error


def copies(grads: Grads) -> Grads:
    """Gradients that a function returned, which may be buffers that it fills once more later."""
    return tuple([None if grad is None else grad.clone() for grad in grads])


def stacked(rows: Mapping[int, Tensor], count: int) -> Tensor | None:
    """
    Gradients at one place, zero where there is none; None if there is none at all.

    :param rows: By loss, in their order.
    :param count: Of all losses.
    """
    if not rows:
        return None
    if len(rows) == count:
        found = [*map(detached, rows.values())]
        return torch.stack(found) if count > 1 else found[0][None]
    first = detached(next(iter(rows.values())))
    # What some of the losses pass through has rows of these.
    whole = first.new_zeros(count, *first.shape)
    for k, row in rows.items():
        whole[k].copy_(detached(row))
    return whole


def detached(grad: Tensor) -> Tensor:
    """A gradient that is dense, and no part of a graph."""
    if type(grad) is Tensor and grad.layout == torch.strided and not grad.requires_grad:
        return grad
    # Where somebody differentiates twice, gradients require grad themselves.
    return dense(grad.detach())
