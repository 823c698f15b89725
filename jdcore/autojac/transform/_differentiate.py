from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jdcore.autojac._problem import Problem
from jdcore.autojac.transform._base import Transform, Values
from jdcore.graph import Reach


class Jac(Transform):
    """
    Jacobians of the inputs from Jacobians of the outputs.

    Values of shape ``[m, *S_output]`` become values of shape ``[m, *S_input]``, freshly allocated.

    :param outputs: Keys needed. Those that do not require grad contribute nothing.
    :param inputs: Keys given. The Jacobian of an input that no output depends on is zero.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param chunk_size: How many rows are differentiated at once, by vmap; None leaves it to the
        library.
    :param graph: What lies behind the outputs, if it is known.
    :param watched: Tensors among which are leaves whose ``.grad`` must not change meanwhile,
        besides those of the graph.
    :param uses: For each row, the positions of the outputs it differentiates: those for which it is
        not zero. Read from the values if it is left out, for which an accelerator must be waited
        for.
    """

    def __init__(
        self,
        outputs: Iterable[Tensor],
        inputs: Iterable[Tensor],
        *,
        retain_graph: bool = False,
        chunk_size: int | None = None,
        graph: Reach | None = None,
        watched: Iterable[Tensor] = (),
        uses: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(needs=outputs, gives=inputs)
        self.retain_graph, self.chunk_size = retain_graph, chunk_size
        self.graph, self.watched, self.uses = graph, tuple(watched), uses

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        # The order of the values is that of `needs`, see Transform.__call__.
        rows = [*values.values()]
        problem = Problem.of(self.needs, self.gives, rows, self.graph, self.watched, self.uses)
        jacobians = problem.jacobians(self.retain_graph, self.chunk_size)
        return dict(zip(self.gives, jacobians, strict=True))
