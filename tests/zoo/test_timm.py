"""Models of timm, small, with random weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.models import wake
from tests.zoo.operators import declare_operators_of_torchvision
from tests.zoo.specimen import IWRM, MTL, Kind, Specimen, check

for _library in ("timm", "torchvision"):
    if importlib.util.find_spec(_library) is None:
        pytest.skip(
            f"{_library} is not installed: tox run -e zoo brings it", allow_module_level=True
        )

declare_operators_of_torchvision()
timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

B = 3


def _group_norm(channels: int, **_: Any) -> nn.Module:
    return nn.GroupNorm(4, channels)


# Name: its size of images, and what makes it small.
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        32,
        {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "deit3": (
        "deit3_small_patch16_224",
        32,
        {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "beit": (
        "beit_base_patch16_224",
        32,
        {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "xcit": (
        "xcit_nano_12_p8_224",
        32,
        {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "cait": (
        "cait_xxs24_224",
        32,
        {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)},
    ),
    "convnext": ("convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}),
    "convnext_v2": ("convnextv2_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}),
    "resnet_group_norm": ("resnet18", 32, {"channels": (8, 8, 12, 12), "norm_layer": _group_norm}),
    "resnet": ("resnet18", 32, {"channels": (8, 8, 12, 12)}),
    "resnet_squeezed": ("seresnet18", 32, {"channels": (8, 8, 16, 16)}),
    "mobilenet": ("mobilenetv3_small_050", 32, {}),
    "efficientnet": ("test_efficientnet", 32, {}),
}


def _specimen(name: str) -> Specimen:
    model, size, arguments = MODELS[name]
    torch.manual_seed(0)
    built = timm.create_model(model, pretrained=False, num_classes=3, **arguments).eval()
    wake(built)
    return Specimen(built, (torch.randn(B, 3, size, size),))


@pytest.mark.parametrize("kind", [IWRM, MTL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", MODELS)
def test_in_float64_all_digits_are_right(name: str, kind: Kind) -> None:
    check(_specimen(name).to(torch.float64), kind, 1e-12)


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet_group_norm", "swin"])
def test_float32_is_near_the_rows_of_float64(name: str) -> None:
    specimen = _specimen(name)
    check(specimen, IWRM, 1e-5, specimen.to(torch.float64))
