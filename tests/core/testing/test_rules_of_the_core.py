"""The rules of the core pass the same checks as those of third parties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from jdcore._layers import CORE_RULES
from jdcore.testing import LayerExample, gramian_rule_tests

# Torch warns that it copies the input of a convolution with an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def _example(make: Callable[[], nn.Module], *shape: int, label: str = "") -> LayerExample:
    return LayerExample(make, lambda n: (torch.randn(n, *shape),), label=label or f"{shape}")


def _tokens(make: Callable[[], nn.Module], label: str) -> LayerExample:
    return LayerExample(make, lambda n: (torch.randint(0, 9, (n, 7)),), label=label)


def _evaluated(layer: Any) -> nn.Module:
    nn.init.uniform_(layer.running_mean, -1.0, 1.0)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    nn.init.normal_(layer.weight)
    return layer.eval()


EXAMPLES = {
    "linear": [
        _example(lambda: nn.Linear(4, 3), 4),
        _example(lambda: nn.Linear(4, 3), 2, 5, 4),
        _example(lambda: nn.Linear(4, 3, bias=False), 5, 4, label="no bias"),
    ],
    "conv1d": [
        _example(lambda: nn.Conv1d(4, 6, 4, groups=2, padding="same"), 4, 8),
        _example(lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), 2, 7),
    ],
    "conv2d": [
        _example(lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), stride=2), 3, 6, 5),
        _example(lambda: nn.Conv2d(2, 3, 2, dilation=2, bias=False), 2, 6, 6, label="dilated"),
        _example(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), 3, 5, 4),
        _example(lambda: nn.Conv2d(2, 3, 1), 2, 16, 16, label="large map"),
    ],
    "conv3d": [_example(lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), 2, 3, 4, 3)],
    "conv_transpose1d": [
        _example(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), 4, 5)
    ],
    "conv_transpose2d": [_example(lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), 3, 4, 3)],
    "conv_transpose3d": [_example(lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), 2, 3, 2, 3)],
    "embedding": [
        _tokens(lambda: nn.Embedding(9, 4), "dense"),
        _tokens(lambda: nn.Embedding(9, 4, padding_idx=0), "padded"),
        _tokens(lambda: nn.Embedding(9, 4, sparse=True), "sparse"),
    ],
    "layer_norm": [
        _example(lambda: nn.LayerNorm(6), 4, 6),
        _example(lambda: nn.LayerNorm((4, 6), bias=False), 4, 6, label="no bias"),
    ],
    "rms_norm": [
        _example(lambda: nn.RMSNorm(6, eps=1e-5), 4, 6),
        _example(lambda: nn.RMSNorm(6, eps=1e-5), 6, label="no positions"),
    ],
    "group_norm": [
        _example(lambda: nn.GroupNorm(2, 6), 6, 4, 3),
        _example(lambda: nn.GroupNorm(3, 6), 6, label="no positions"),
    ],
    "instance_norm1d": [_example(lambda: nn.InstanceNorm1d(4, affine=True), 4, 6)],
    "instance_norm2d": [
        _example(
            lambda: _evaluated(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
            *(4, 3, 2),
            label="running statistics",
        )
    ],
    "instance_norm3d": [_example(lambda: nn.InstanceNorm3d(3, affine=True), 3, 2, 3, 2)],
    "batch_norm1d": [
        _example(lambda: _evaluated(nn.BatchNorm1d(4)), 4),
        _example(lambda: _evaluated(nn.BatchNorm1d(4)), 4, 6),
    ],
    "batch_norm2d": [_example(lambda: _evaluated(nn.BatchNorm2d(4)), 4, 3, 2)],
    "batch_norm3d": [_example(lambda: _evaluated(nn.BatchNorm3d(3)), 3, 2, 3, 2)],
    "prelu": [_example(nn.PReLU, 4, 6), _example(lambda: nn.PReLU(6), 6, 4, label="by channel")],
}

REFUSED = {
    "embedding": [
        _tokens(lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), "frequencies"),
        _tokens(lambda: nn.Embedding(9, 4, max_norm=1.0), "max_norm"),
    ]
}


def test_every_rule_of_the_core_has_examples() -> None:
    assert set(EXAMPLES) == {spec.name for spec in CORE_RULES}


for _name, _examples in EXAMPLES.items():
    globals()[f"test_{_name}"] = gramian_rule_tests(
        f"jdcore:{_name}", *_examples, refused=REFUSED.get(_name, ())
    )
