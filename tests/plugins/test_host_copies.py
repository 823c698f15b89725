"""On an accelerator, a step waits for as few numbers of a large model as of a small one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import jdcore
from jdcore._registry import registry
from jdcore.aggregation._informed import example_inputs
from jdcore.protocols import BlockwiseAggregator

# What reads numbers of a Tensor, for which the host waits if they are on an accelerator.
_READS = (
    *("cpu", "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "equal"),
    *("__bool__", "__float__", "__int__", "__index__"),
)


class Elsewhere(TorchFunctionMode):
    """Makes all Tensors say that they are on an accelerator, but those that came from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._here: dict[int, Tensor] = {}  # they are held, so that no other gets their number

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        here = first is not None and id(first) in self._here
        if function == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]  # made in C
            return here
        result = function(*args, **(kwargs or {}))
        if first is None and isinstance(result, Tensor):  # made by the host
            here = name != "_foreach_norm"
        elif name in _READS and not here:
            self.reads.append(name)
            here = name in ("cpu", "numpy")
        elif name == "to" and any(isinstance(argument, torch.device) for argument in args):
            here = False  # sent there
        if here:
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, Tensor):
                    self._here[id(tensor)] = tensor
        return result


def reads(name: str, m: int, widths: Sequence[int]) -> list[str]:
    spec = registry.aggregator(name).spec
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(m, n, generator=generator) for n in widths]
    inputs = example_inputs(spec, torch.cat(blocks, dim=1))
    if "second" in inputs:
        inputs["second"] = list(inputs["second"].split(list(widths), dim=1))
    aggregator: Any = jdcore.get_aggregator(name, **spec.example(m))
    with Elsewhere() as mode:
        aggregator.aggregate_blocks(blocks, **inputs)
    return mode.reads


NAMES = [
    name
    for name in jdcore.list_aggregators()
    if isinstance(
        jdcore.get_aggregator(name, **registry.aggregator(name).spec.example(5)),
        BlockwiseAggregator,
    )
]


@pytest.mark.parametrize("name", NAMES)
def test_the_host_reads_no_more_of_many_parameters(name: str) -> None:
    few = reads(name, 5, [3000, 20_000])
    assert reads(name, 5, [3000, 20_000] * 4) == few
    assert len(few) <= 4, few
