from __future__ import annotations

from typing import Any

import torch

from jdcore.graph.shares import _product


def test_settings_of_tf32_are_as_before_afterwards() -> None:
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with _product._without_tf32():
            if _product._BY_KIND:
                assert matmul.fp32_precision == "ieee"
            else:
                assert not matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        assert matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
