from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from jdcore.autogram._call import LayerCall
from jdcore.autogram._cost import outer_ghost_beats_rows
from jdcore.autogram.blocks import Block, OuterBlock


class LinearRule:
    """``y = x Wᵀ + b`` over any leading dimensions: outer products of grads and inputs."""

    parameters = ("weight", "bias")

    def refusal(self, module: nn.Module) -> str | None:
        del module
        return None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        inputs, grads = call.positions(call.input), call.positions(call.grads, 1)
        yield OuterBlock(call.wanted("weight"), call.wanted("bias"), inputs, grads)

    def beats_rows(
        self, module: nn.Linear, args: tuple[Any, ...], output_shape: torch.Size, tasks: int
    ) -> bool:
        del args
        positions = output_shape.numel() // max(1, module.out_features)
        return outer_ghost_beats_rows(tasks, positions, module.in_features, module.out_features)
