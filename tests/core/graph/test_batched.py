"""What is batched, operation by operation, against passes of single gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jdcore.graph import _batched
from jdcore.graph._batched import batched_gradients, without_warning
from jdcore.graph._operations import having, is_batchable, operation

_ENTRIES = """
    neg exp exp2 expm1 sigmoid tanh sin cos tan sinh cosh asinh atan erf erfc abs relu reciprocal
"""
_POSITIVE = "log log1p log2 log10 sqrt rsqrt"
_FRACTIONS = "asin acos atanh"
_FUNCTIONS = "gelu silu mish softplus logsigmoid elu leaky_relu hardtanh hardswish hardsigmoid"


def _entrywise(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    function = getattr(torch, name, None) or getattr(F, name)
    if name in _POSITIVE.split():
        return lambda x, y: function(x.square() + 0.5)
    if name in _FRACTIONS.split():
        return lambda x, y: function(0.9 * x.sin())
    return lambda x, y: function(x)


INDEX = torch.tensor([2, 0, 2])
IMAGES = (2, 4, 6, 6)

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    name: _entrywise(name)
    for name in [*_ENTRIES.split(), *_POSITIVE.split(), *_FRACTIONS.split(), *_FUNCTIONS.split()]
}
OPERATIONS |= {
    "acosh": lambda x, y: torch.acosh(x.square() + 1.5),
    "add": lambda x, y: x + y[0],
    "sub": lambda x, y: x - y[:, :1],
    "rsub": lambda x, y: torch.rsub(x, y),
    "mul": lambda x, y: x * y[0],
    "div": lambda x, y: x / (y.square() + 1),
    "threshold": lambda x, y: F.threshold(x, 0.1, 2.0),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x, y: x.clamp_min(0.0),
    "clamp_max": lambda x, y: x.clamp_max(0.0),
    "power of a number": lambda x, y: x.pow(3),
    "power of a tensor": lambda x, y: (x.square() + 0.5).pow(y),
    "masked_fill": lambda x, y: x.masked_fill(y.detach() > 0, 0.0),
    "where": lambda x, y: torch.where(x.detach() > 0, x, y),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clone": lambda x, y: x.clone(),
    "to": lambda x, y: x.float().double(),
    "alias": lambda x, y: torch.ops.aten.alias(x),
    "view": lambda x, y: x.view(2, 6),
    "unsafe view": lambda x, y: torch.ops.aten._unsafe_view(x, (2, 6)),
    "t": lambda x, y: x.t(),
    "expand": lambda x, y: x[:, None].expand(3, 2, 4),
    "unsqueeze": lambda x, y: x.unsqueeze(1),
    "squeeze": lambda x, y: x.unsqueeze(1).squeeze(1) + x.unsqueeze(0).squeeze(),
    "transpose": lambda x, y: x.transpose(0, 1),
    "permute": lambda x, y: x.permute(1, 0),
    "slice": lambda x, y: x[1:, ::2],
    "select": lambda x, y: x[:, 1],
    "split": lambda x, y: x.split(2)[0] * x.split(2)[1],
    "unsafe split": lambda x, y: torch.unsafe_split(x, 2)[1].sin(),
    "split with sizes": lambda x, y: x.split([1, 3], 1)[1],
    "unbind": lambda x, y: x.unbind()[0] * x.unbind()[2],
    "cat": lambda x, y: torch.cat([x, y], 1),
    "stack": lambda x, y: torch.stack([x, y, x]),
    "sum": lambda x, y: x.sum(0) + x.sum(),
    "mean": lambda x, y: x.mean(1) * x.mean(),
    "var": lambda x, y: x.var(0) + x.var(),
    "logsumexp": lambda x, y: x.logsumexp(1),
    "softmax": lambda x, y: x.softmax(1),
    "log_softmax": lambda x, y: x.log_softmax(0),
    "amax": lambda x, y: x.amax(1),
    "amin": lambda x, y: x.amin(0),
    "mm": lambda x, y: x @ y.T,
    "addmm": lambda x, y: torch.addmm(x[:, :3], x, y.T, beta=2.0, alpha=0.5),
    "bmm": lambda x, y: x.view(2, 3, 2) @ y.view(2, 2, 3),
    "baddbmm": lambda x, y: torch.baddbmm(
        x.view(3, 2, 2), x.view(3, 2, 2), y.view(3, 2, 2), alpha=2.0
    ),
    "mv": lambda x, y: x @ y[0],
    "dot": lambda x, y: torch.dot(x[0], y[1])[None],
    "layer norm": lambda x, y: F.layer_norm(x, (4,), y[0], y[1]),
    "group norm": lambda x, y: F.group_norm(_images(x), 2, y[0], y[1]),
    "batch norm": lambda x, y: F.batch_norm(_images(x), None, None, y[0], y[1], training=True),
    "running norm": lambda x, y: F.batch_norm(
        _images(x), torch.zeros(4), torch.ones(4), y[0], y[1]
    ),
    "embedding": lambda x, y: F.embedding(torch.tensor([[0, 2], [2, 2]]), x),
    "index": lambda x, y: x[INDEX, INDEX] * x[INDEX].sum(1),
    "index_select": lambda x, y: x.index_select(0, INDEX),
    "gather": lambda x, y: x.gather(0, INDEX[None].expand(2, 3)),
    "mse": lambda x, y: F.mse_loss(x, y),
    "smooth l1": lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
    "bce": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.detach().sigmoid()),
    "bce with logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y.detach().sigmoid()),
    "nll": lambda x, y: F.nll_loss(x, INDEX),
    "convolution": lambda x, y: F.conv2d(_images(x), _kernel(y), y[0], stride=2, padding=1),
    "convolution of groups": lambda x, y: F.conv2d(_images(x), _kernel(y)[:, :2], groups=2),
    "transposed convolution": lambda x, y: F.conv_transpose2d(_images(x), _kernel(y), stride=2),
    "max_pool2d": lambda x, y: F.max_pool2d(_images(x), 2),
    "avg_pool2d": lambda x, y: F.avg_pool2d(_images(x), 2),
    "adaptive_avg_pool2d": lambda x, y: F.adaptive_avg_pool2d(_images(x), 2),
    "pad": lambda x, y: F.pad(x, (1, 2)),
    "vector norm": lambda x, y: torch.linalg.vector_norm(x, dim=1),
    "attention": lambda x, y: F.scaled_dot_product_attention(
        *(z.view(1, 1, 3, 4) for z in (x, y, x * y))
    ),
}


def _images(x: Tensor) -> Tensor:
    waves = torch.linspace(-1, 1, 2 * 36).view(2, 1, 6, 6)
    return (x.sum(0).view(1, 4, 1, 1) * waves).sin() + x[0].view(1, 4, 1, 1)


def _kernel(y: Tensor) -> Tensor:
    return (y.flatten()[:, None] * torch.linspace(-1, 1, 12)).view(4, 4, 3, 3)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(3, 4, generator=generator, requires_grad=True) for _ in range(2))
    return x, y


def _names(result: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {}
    stack, seen = [result.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[node.name()] = node
            stack += [child for child, _ in node.next_functions]
    found.pop("torch::autograd::AccumulateGrad")
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_batched_gradients_are_those_of_single_passes(name: str) -> None:
    x, y = _operands()
    result = OPERATIONS[name](x, y)
    assert all(is_batchable(*named) for named in _names(result).items())
    given = torch.randn(5, *result.shape, generator=torch.Generator().manual_seed(4))
    with without_warning(_names(result)):
        found = batched_gradients([result], [x, y], [given], retain_graph=True)
    for k in range(5):
        expected = torch.autograd.grad(
            result, [x, y], given[k], retain_graph=True, allow_unused=True
        )
        for got, row in zip(found, expected, strict=True):
            assert (got is None) == (row is None)
            if got is not None and row is not None:
                torch.testing.assert_close(got[k], row, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("m", [1, 3])
def test_vmap_itself_gives_the_same_where_torch_does_not_show_what_it_is_made_of(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _batched.QUICK  # in all versions of torch that are tested
    x, y = _operands()
    result = (x * y).sin()
    inputs = [x, torch.ones(2, requires_grad=True), y]
    cotangents = [torch.randn(m, *result.shape)]
    quick = batched_gradients([result], inputs, cotangents, retain_graph=True)
    monkeypatch.setattr(_batched, "QUICK", False)
    slow = batched_gradients([result], inputs, cotangents, retain_graph=True)
    assert quick[1] is None
    assert slow[1] is None
    for one, other in zip(quick[::2], slow[::2], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_all_names_are_covered() -> None:
    seen = {
        operation(name)
        for function in OPERATIONS.values()
        for name in _names(function(*_operands()))
    }
    assert seen == having("batched")


def test_what_torch_batches_wrongly_or_what_runs_python_is_not_batched() -> None:
    x, y = _operands()

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooked = x.exp()
    sparse = F.embedding(INDEX, x, sparse=True)
    scattered = torch.as_strided_scatter(x, y[0], (4,), (1,))
    [slope] = torch.autograd.grad(x.tanh().sum(), x, create_graph=True)
    for result in (torch.cdist(x, y), scattered, Custom.apply(x), hooked, sparse, slope):
        assert not all(is_batchable(*named) for named in _names(result).items())
