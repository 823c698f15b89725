"""The model: one trunk that both tasks share, and one linear head per task."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from jdcore.demo.data import HEIGHT, WIDTH

CLASSES = 10

# A narrow trunk, so that the two tasks have to compete for the features that pass through it.
_WIDTHS = (HEIGHT * WIDTH, 64, 32, 16, 8)


class TwoDigitReader(nn.Module):
    """Reads the left digit with its first head and the right digit with its second."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            layer
            for inputs, outputs in pairwise(_WIDTHS)
            for layer in (nn.Linear(inputs, outputs), nn.ReLU())
        ]
        self.trunk = nn.Sequential(nn.Flatten(), *layers)
        self.heads = nn.ModuleList(nn.Linear(_WIDTHS[-1], CLASSES) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [k, 2, CLASSES] of images [k, HEIGHT, WIDTH]."""
        features = self.trunk(images)
        return torch.stack([head(features) for head in self.heads], dim=1)
