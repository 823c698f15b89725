from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from jdcore.autojac._rows import jacobians
from jdcore.autojac.transform._base import Transform, Values


class Grad(Transform):
    """
    Gradients of the inputs from gradients of the outputs: one vector-Jacobian product.

    :param outputs: Keys needed; they must require grad.
    :param inputs: Keys given. The gradient of an input that no output depends on is zero.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    """

    def __init__(
        self, outputs: Iterable[Tensor], inputs: Iterable[Tensor], *, retain_graph: bool = False
    ) -> None:
        super().__init__(needs=outputs, gives=inputs)
        self.retain_graph = retain_graph

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        gradients = torch.autograd.grad(
            self.needs,
            self.gives,
            list(values.values()),
            retain_graph=self.retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(self.gives, gradients, strict=True))


class Jac(Transform):
    """
    Jacobians of the inputs from Jacobians of the outputs.

    Values of shape ``[m, *S_output]`` become values of shape ``[m, *S_input]``, freshly allocated.

    :param outputs: Keys needed. Those that do not require grad contribute nothing.
    :param inputs: Keys given. The Jacobian of an input that no output depends on is zero.
    :param retain_graph: Whether the graph can be differentiated again afterwards.
    :param chunk_size: How many rows are differentiated at once, by vmap; None leaves it to the
        library.
    """

    def __init__(
        self,
        outputs: Iterable[Tensor],
        inputs: Iterable[Tensor],
        *,
        retain_graph: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(needs=outputs, gives=inputs)
        self.retain_graph = retain_graph
        self.chunk_size = chunk_size

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        results = jacobians(
            list(self.needs),
            list(self.gives),
            list(values.values()),
            retain_graph=self.retain_graph,
            chunk_size=self.chunk_size,
        )
        return dict(zip(self.gives, results, strict=True))
