"""On an accelerator, a step waits for as few numbers of a large model as of a small one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import jdcore
from jdcore._discovery import AGGREGATOR
from jdcore._registry import registry
from jdcore.aggregation._informed import example_inputs
from jdcore.protocols import BlockwiseAggregator

# What reads numbers of a Tensor, for which the host waits if they are on an accelerator.
_READS = (
    *("cpu", "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "equal"),
    *("__bool__", "__float__", "__int__", "__index__"),
)


class Elsewhere(TorchFunctionMode):
    """Makes some Tensors, and what is computed from them, say that they are on an accelerator."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.reads: list[str] = []
        # They are held, so that no other gets their number.
        self._there = {id(tensor): tensor for tensor in given}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", "")
        operands = tree_leaves((args, kwargs))
        there = any(id(operand) in self._there for operand in operands)
        if function == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]  # made in C
            return not there
        result = function(*args, **(kwargs or {}))
        if there and name in _READS:
            self.reads.append(name)
            if name == "cpu":
                result = result.detach()  # no longer the same Tensor
        elif there or (name == "to" and any(isinstance(o, torch.device) for o in operands)):
            found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._there.update((id(tensor), tensor) for tensor in found)
        return result


def reads(name: str, m: int, widths: Sequence[int]) -> list[str]:
    spec = registry.entry(AGGREGATOR, name).spec
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(m, n, generator=generator) for n in widths]
    inputs = example_inputs(spec, torch.cat(blocks, dim=1))
    if "second" in inputs:
        inputs["second"] = list(inputs["second"].split(list(widths), dim=1))
    aggregator: Any = jdcore.get_aggregator(name, **spec.example(m))
    tensors = [t for t in tree_leaves((blocks, inputs)) if isinstance(t, Tensor)]
    with Elsewhere(*tensors) as mode:
        aggregator.aggregate_blocks(blocks, **inputs)
    return mode.reads


NAMES = [
    name
    for name in jdcore.list_aggregators()
    if isinstance(
        jdcore.get_aggregator(name, **registry.entry(AGGREGATOR, name).spec.example(5)),
        BlockwiseAggregator,
    )
]


@pytest.mark.parametrize("name", NAMES)
def test_the_host_reads_no_more_of_many_parameters(name: str) -> None:
    few = reads(name, 5, [3000, 20_000])
    assert reads(name, 5, [3000, 20_000] * 4) == few
    assert len(few) <= 4, few
