"""What lets torchvision be imported next to a torch that it was not compiled for."""

from __future__ import annotations

from typing import Any

import torch

# The torchvision of PyPI is compiled for a torch with CUDA. Next to a torch without, its operators
# are missing, and its import stops where it describes these two. timm and transformers import
# torchvision, and need neither. The library object holds the definitions.
_TORCHVISION: Any = torch.library.Library("torchvision", "FRAGMENT")


def declare_operators_of_torchvision() -> None:
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _TORCHVISION.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
