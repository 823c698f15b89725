from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch

import jdcore.graph
from jdcore.graph.shares import _product

_PRODUCTS = {"matmul", "mm", "bmm", "mv", "dot", "einsum", "tensordot", "addmm", "baddbmm", "inner"}
_PRODUCTS |= {"linear", "bilinear", "convolution_backward", "conv2d", "outer"}


def test_settings_of_tf32_are_as_before_afterwards() -> None:
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with _product._without_tf32(matmul):
            assert matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
        assert matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def _multiplies(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    call = node.func if isinstance(node, ast.Call) else None
    return isinstance(call, ast.Attribute) and call.attr in _PRODUCTS


def test_products_are_made_in_one_place_where_tf32_is_kept_out() -> None:
    root = Path(jdcore.graph.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _multiplies(node)
    }
    # The second one calls torch's own weight gradient, in the same context.
    assert found == {"shares/_product.py", "shares/_patches.py"}
