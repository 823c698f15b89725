from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define
from numpy.typing import NDArray
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jdcore.graph
from jdcore import RowByRowWarning
from jdcore._modes import exact_products
from jdcore.aggregation import GramianSource, RowMixing
from jdcore.autogram import Engine
from jdcore.graph.shares import _product
from jdcore.graph.shares._patches import Geometry
from jdcore.linalg import combine

_BACKENDS: Any = torch.backends
_DISPATCHED = {"mm", "bmm", "mv", "addmm", "addmv", "convolution_backward"}

_PRODUCTS = {"matmul", "mm", "bmm", "mv", "dot", "einsum", "tensordot", "addmm", "baddbmm", "inner"}
_PRODUCTS |= {"linear", "bilinear", "convolution_backward", "conv2d", "outer"}


@pytest.fixture(params=["high", "medium"])
def rounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """The user lets products of float32 round their factors to TF32, or to bfloat16."""
    conv, before = _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.conv.fp32_precision
    torch.set_float32_matmul_precision(request.param)
    conv.fp32_precision = {"high": "tf32", "medium": "bf16"}[request.param]
    found = _settings()
    yield
    assert _settings() == found
    assert torch.get_float32_matmul_precision() == request.param
    torch.set_float32_matmul_precision("highest")
    conv.fp32_precision = before


def _settings() -> list[str]:
    mkldnn, cuda = _BACKENDS.mkldnn, _BACKENDS.cuda
    return [kind.fp32_precision for kind in (mkldnn.matmul, mkldnn.conv, cuda.matmul)]


class _Precisions(TorchDispatchMode):
    """The setting under which each product of float32 is made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in _DISPATCHED and all(t.dtype == torch.float32 for t in tensors):
            kind = _BACKENDS.mkldnn.conv if "conv" in name else _BACKENDS.mkldnn.matmul
            self.found.append((name, kind.fp32_precision))
        return func(*args, **(kwargs or {}))


def _products_of_shares() -> None:
    a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    _product.product(a, b)
    _product.product(a[0], b[0], out=torch.empty(3, 5))


def _weight_gradient_of_a_convolution() -> None:
    geometry = Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    images, grads = torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4)
    geometry.weight_gradient(grads, images, torch.ones(5, 3, 1, 1))


def _combinations_of_rows() -> None:
    combine(torch.ones(3), torch.ones(3, 8))
    combine(torch.ones(3), torch.ones(3, 1 << 20))
    combine(torch.ones(3), torch.ones(3, 8, dtype=torch.bfloat16))


@define(eq=False)
class _Sum(RowMixing):
    def mix(self, source: GramianSource) -> NDArray[np.float64]:
        return np.ones((1, 2))


def _mixed_rows() -> None:
    _Sum(lambda matrix: matrix[0])(torch.ones(2, 8))


@pytest.mark.parametrize(
    "compute",
    [
        _products_of_shares,
        _weight_gradient_of_a_convolution,
        _combinations_of_rows,
        _mixed_rows,
    ],
)
@pytest.mark.usefixtures("rounded")
def test_factors_of_our_own_products_are_not_rounded(compute: Callable[[], None]) -> None:
    with _Precisions() as precisions:
        compute()
    assert precisions.found
    assert {precision for _, precision in precisions.found} == {"ieee"}


@pytest.mark.usefixtures("rounded")
def test_the_model_of_the_user_keeps_its_setting() -> None:
    before = _settings()
    model, x = nn.Linear(4, 3), torch.ones(5, 4)
    losses = model(x).square().sum(1)
    seen: list[list[str]] = []
    losses.grad_fn.register_prehook(lambda _: seen.append(_settings()))  # type: ignore[union-attr]
    with pytest.warns(RowByRowWarning):
        Engine(model, batch_dim=0).compute_gramian(losses)
    assert seen
    assert all(found == before for found in seen)


@pytest.mark.usefixtures("rounded")
def test_products_of_two_threads_are_exact_until_both_are_made() -> None:
    before, factor = _settings(), torch.ones(1)
    first, second = exact_products(factor), None
    with first:
        second = exact_products(factor)
        second.__enter__()
    assert _settings() != before
    second.__exit__(None, None, None)
    assert _settings() == before


@pytest.mark.parametrize("whose", [_BACKENDS, _BACKENDS.mkldnn], ids=["all", "of a device"])
@pytest.mark.parametrize("operation", ["matmul", "conv"])
def test_settings_that_are_inherited_are_so_afterwards(whose: Any, operation: str) -> None:
    kind = getattr(_BACKENDS.mkldnn, operation)
    settings = [(of, of.fp32_precision) for of in (whose, kind)]
    whose.fp32_precision, kind.fp32_precision = "bf16", "none"
    try:
        with exact_products(torch.ones(1), operation):
            assert kind.fp32_precision == "ieee"
        assert kind.fp32_precision == "bf16"
        whose.fp32_precision = "ieee"
        assert kind.fp32_precision == "ieee"
    finally:
        for of, before in settings:
            of.fp32_precision = before


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The version of the kernels of a CUDA device, which there need not be."""
    found = [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(found))
    _product._ever_has_mixed.cache_clear()
    yield found
    _product._ever_has_mixed.cache_clear()


def test_halves_are_multiplied_into_float32_where_torch_does_so(
    capability: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> tuple[bool, bool]:
        _product._ever_has_mixed.cache_clear()
        device = torch.device("cuda", 0)
        return tuple(_product._has_mixed(d, device) for d in (torch.float16, torch.bfloat16))  # type: ignore[return-value]

    assert found() == (True, True)
    capability[:] = [7, 5]
    assert found() == (True, False)
    capability[:] = [9, 0]
    try:
        _BACKENDS.cuda.matmul.allow_fp16_accumulation = True
        assert found() == (False, True)
    finally:
        _BACKENDS.cuda.matmul.allow_fp16_accumulation = False
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert found() == (False, False)


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
