"""On a CUDA device: some of the zoo, what only its kernels do, and what its products round to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor, nn
from torch.nn import functional as F

from jdcore.autogram import Engine
from jdcore.graph._saved import saved
from jdcore.graph.shares import product
from tests.zoo.models import MODELS
from tests.zoo.specimen import (
    IWMTL,
    IWRM,
    MTL,
    Kind,
    Specimen,
    as_matrix,
    check,
    check_against,
    error_of,
    losses_of,
    rows_of,
)

DEVICE = "cuda"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
]

CHOSEN = [
    *("mlp_on_sequences", "residual", "convolutions", "norms", "channels_last"),
    *("transformer", "encoder_and_decoder", "learned_queries", "rotary_grouped_attention"),
    *("tied_embedding", "bags", "a_layer_used_thrice", "merged_lora", "weight_norm"),
    *("lstm", "gru", "rnn", "routed_experts", "graph_network", "checkpoints", "implicit_layer"),
]
AUTOCAST = ["mlp_on_sequences", "residual", "transformer", "tied_embedding", "merged_lora"]

_TF32 = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """Models make index tensors and masks without a device."""
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=["ieee"], autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """How float32 is multiplied in forward passes: convolutions round to TF32 by default."""
    before: list[Any] = [kind.fp32_precision for kind in _TF32]
    for kind in _TF32:
        kind.fp32_precision = request.param
    yield request.param
    for kind, chosen in zip(_TF32, before, strict=True):
        kind.fp32_precision = chosen


def _specimen(name: str, dtype: torch.dtype = torch.float32) -> Specimen:
    with torch.device("cpu"):
        made = MODELS[name]().to(dtype)
    inputs = tuple(x.to(DEVICE) for x in made.inputs)
    return evolve(made, model=made.model.to(DEVICE), inputs=inputs)


@pytest.mark.parametrize("kind", [IWRM, IWMTL, MTL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", CHOSEN)
def test_in_float64_all_digits_are_right(name: str, kind: Kind) -> None:
    check(_specimen(name, torch.float64), kind, 1e-12)


@pytest.mark.parametrize("name", CHOSEN)
def test_float32_is_near_the_rows_of_float64(name: str) -> None:
    specimen = _specimen(name)
    # The kernels of recurrent layers are off by 1e-5 themselves.
    exact = None if name in RECURRENT else _specimen(name, torch.float64)
    check(specimen, IWRM, max(specimen.single, 2e-6), exact)


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_is_near_the_rows_of_autocast(name: str) -> None:
    specimen = _specimen(name)
    rows = rows_of(losses_of(specimen, IWRM, torch.bfloat16), specimen.parameters)
    check_against(specimen, lambda: losses_of(specimen, IWRM, torch.bfloat16), 0, rows, 2e-2)


# -- kernels that only accelerators have -----------------------------------------------------------

RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True),
    "tanh": lambda: nn.RNN(3, 4, batch_first=True),
    "relu": lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("kind", [IWRM, IWMTL, MTL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", RECURRENT)
def test_fused_recurrent_kernels_are_called(name: str, kind: Kind) -> None:
    torch.manual_seed(0)
    model = RECURRENT[name]().double()
    specimen = Specimen(
        model,
        (torch.randn(5, 6, 3, dtype=torch.float64),),
        outputs=lambda model, x: model(x)[0],
    )
    check(specimen, kind, 1e-12)
    losses = losses_of(specimen, kind)
    served = Engine(model, batch_dim=kind.batch_dim).explain(losses)
    assert ("called for each sample" in served) == (kind.batch_dim is not None)


def test_fused_rms_norm_and_batch_norm_show_what_their_closed_forms_need() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    weight, state = torch.ones(3, requires_grad=True), torch.ones(3)
    node = F.rms_norm(x, (3,), weight).grad_fn
    assert node is not None
    assert node.name() == "FusedRmsNormBackward0"
    assert tuple(saved(node, "normalized_shape")) == (3,)
    assert torch.equal(saved(node, "input"), x)
    x = x.detach()
    inverse = (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
    found = saved(node, "result1").detach()
    assert error_of(found.reshape(-1, 1), inverse) < 1e-6
    node = F.batch_norm(x.requires_grad_()[..., None, None], state, state, weight, weight).grad_fn
    assert node is not None
    for name in ("input", "running_mean", "running_var", "training"):
        saved(node, name)


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 300), (300, 4)), ((2, 5, 300), (2, 300, 4)), ((3, 2, 5, 300), (2, 300, 4))],
)
def test_products_of_halves_are_summed_in_float32(
    left: tuple[int, ...], right: tuple[int, ...], dtype: torch.dtype
) -> None:
    a, b = torch.randn(left, dtype=dtype), torch.randn(right, dtype=dtype)
    got = product(a, b)
    assert got.dtype == torch.float32
    assert error_of(got, a.double() @ b.double()) < 1e-6


class _Sums(nn.Module):
    """Layers whose gradients are exact in any precision, so that the products alone round."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.convolution = nn.Linear(300, 40), nn.Conv2d(3, 40, 3)
        self.matrices, self.table = nn.Parameter(torch.randn(4, 300, 40)), nn.Embedding(9, 40)

    def forward(self, x: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        parts = [
            self.linear(x).sum((1, 2)),
            self.convolution(images).sum((1, 2, 3)),
            (x.reshape(-1, 300).expand(4, -1, -1) @ self.matrices).view(4, len(x), -1).sum((0, 2)),
            self.table(tokens).sum((1, 2)),
        ]
        return torch.stack(parts).sum(0)


@pytest.mark.parametrize("precision", ["tf32", "none"], indirect=True)
@pytest.mark.parametrize("budget", [None, 1 << 12, 1 << 30])
def test_tf32_does_not_enter_our_own_products(precision: str, budget: int | None) -> None:
    torch.manual_seed(0)
    model = _Sums()
    inputs = torch.randn(6, 5, 300), torch.randn(6, 3, 9, 9), torch.randint(9, (6, 7))
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    losses = model(*inputs)
    engine = Engine(model, batch_dim=0, memory_budget=budget)
    gramian = engine.compute_gramian(losses)
    weights = torch.linspace(-1.0, 2.0, 6)
    engine.backward(losses, lambda _: weights)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rows = rows_of(model.double()(*exact), list(model.parameters()))
    # TF32 would leave 1e-5 to 1e-3.
    assert error_of(as_matrix(gramian, 1), rows @ rows.T) < 3e-6
    expected = weights.double() @ rows
    assert error_of(torch.cat([g.flatten() for g in found]), expected) < 3e-6
    assert all(kind.fp32_precision == precision for kind in _TF32)


# -- what others hang on a graph -------------------------------------------------------------------


def test_retained_gradients_are_those_of_the_weighted_losses() -> None:
    layer = nn.Linear(3, 2)
    hidden = layer(torch.randn(4, 3))
    hidden.retain_grad()
    weights = torch.linspace(-1.0, 2.0, 4)
    engine = Engine(layer, batch_dim=0)
    losses = hidden.sum(1)
    engine.compute_gramian(losses)
    assert hidden.grad is None
    engine.backward(losses, lambda _: weights)
    assert torch.equal(hidden.grad, weights[:, None].expand(4, 2))
