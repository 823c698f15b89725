from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jdcore.graph.shares import _outer, _patches
from tests.core.autogram.oracle import check_engine, randn

# Torch warns that it copies the input of a convolution with an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

B = 5
Make = Callable[[], nn.Module]


def _flat(shape: tuple[int, ...]) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(randn(B, *shape)).pow(2).flatten(1).sum(1)


def _tasks(shape: tuple[int, ...]) -> Callable[[nn.Module], Tensor]:
    def losses(model: nn.Module) -> Tensor:
        squares = model(randn(B, *shape)).pow(2)
        return squares.reshape(B, squares.shape[1], -1).sum(2)[:, :3]

    return losses


def _whole(shape: tuple[int, ...]) -> Callable[[nn.Module], Tensor]:
    return lambda model: _tasks(shape)(model).mean(0)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (3, 2), padding=(1, 0), bias=False, dilation=(2, 1)),
        nn.InstanceNorm2d(4, affine=True),
        nn.Conv2d(4, 4, 1),
    )


def _bn_running(layer: nn.Module) -> nn.Module:
    for buffer in (layer.running_mean, layer.running_var):
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
    nn.init.normal_(layer.weight)
    return layer.eval()


LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (_mlp, (6,)),
    "linear over positions": (_mlp, (4, 6)),
    "linear over two dimensions of positions": (_mlp, (2, 3, 6)),
    "conv2d": (_cnn, (3, 8, 8)),
    "conv1d grouped, same": (
        lambda: nn.Conv1d(4, 6, 4, groups=2, padding="same"),
        (4, 8),
    ),
    "conv1d circular": (lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"), (4, 8)),
    "conv2d reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
        (3, 5, 6),
    ),
    "conv2d replicate, strided": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate", stride=2),
        (3, 5, 6),
    ),
    "conv2d same, even kernel": (lambda: nn.Conv2d(3, 4, 2, padding="same"), (3, 5, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1, stride=(1, 2, 1)), (2, 4, 4, 5)),
    "conv transpose 1d": (
        lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2, output_padding=1),
        (6, 5),
    ),
    "conv transpose 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 4, 5)),
    "conv transpose 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 3, 3, 3)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), (4, 6)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((4, 6)), (3, 4, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (4, 6)),
    "rms norm with eps": (lambda: nn.RMSNorm((4, 6), eps=1e-3), (3, 4, 6)),
    "group norm": (lambda: nn.GroupNorm(3, 6), (6, 4)),
    "group norm without positions": (lambda: nn.GroupNorm(2, 6), (6,)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 6)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(3, affine=True), (3, 2, 3, 2)),
    "instance norm with statistics": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        (4, 6),
    ),
    "instance norm in eval mode": (
        lambda: _bn_running(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        (4, 3, 2),
    ),
    "batch norm 1d in eval mode": (lambda: _bn_running(nn.BatchNorm1d(6)), (6,)),
    "batch norm 2d in eval mode": (lambda: _bn_running(nn.BatchNorm2d(4)), (4, 3, 3)),
    "batch norm 3d in eval mode": (lambda: _bn_running(nn.BatchNorm3d(4)), (4, 3, 2, 2)),
    "prelu": (lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU()), (4, 6)),
    "prelu by channel": (lambda: nn.PReLU(6), (6, 4)),
    "bilinear, without a rule": (lambda: _SelfBilinear(), (6,)),
}


class _SelfBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, torch.tanh(x))


@pytest.mark.parametrize("name", LAYERS)
def test_one_loss_per_sample(name: str) -> None:
    make, shape = LAYERS[name]
    check_engine(make, _flat(shape), 0)


@pytest.mark.parametrize("name", LAYERS)
def test_several_losses_per_sample(name: str) -> None:
    make, shape = LAYERS[name]
    check_engine(make, _tasks(shape), 0)


@pytest.mark.parametrize("name", LAYERS)
def test_losses_of_the_whole_batch(name: str) -> None:
    make, shape = LAYERS[name]
    check_engine(make, _whole(shape), None)


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("losses", [_flat, _tasks])
def test_linear_forms_agree(
    monkeypatch: pytest.MonkeyPatch, ghost: bool, losses: Callable[..., object]
) -> None:
    monkeypatch.setattr(_outer, "outer_ghost_beats_direct", lambda *_: ghost)
    check_engine(_mlp, losses((4, 6)), 0)


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("losses", [_flat, _tasks])
def test_convolution_forms_agree(
    monkeypatch: pytest.MonkeyPatch, ghost: bool, losses: Callable[..., object]
) -> None:
    monkeypatch.setattr(_patches, "conv_ghost_beats_direct", lambda *_: ghost)
    check_engine(_cnn, losses((3, 8, 8)), 0)


@pytest.mark.parametrize("ghost", [True, False])
def test_convolution_over_samples_folded_with_time(
    monkeypatch: pytest.MonkeyPatch, ghost: bool
) -> None:
    monkeypatch.setattr(_patches, "conv_ghost_beats_direct", lambda *_: ghost)

    def losses(model: nn.Module) -> Tensor:
        return model(randn(B * 3, 3, 8, 8)).pow(2).reshape(B, -1).sum(1)

    check_engine(_cnn, losses, 0)


@pytest.mark.parametrize("transposed", [True, False])
def test_convolutions_of_one_position_behind_a_layer_with_channels_last(transposed: bool) -> None:
    """Torch refuses one convolution for all samples, by strides that tell nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            kind = nn.ConvTranspose1d if transposed else nn.Conv1d
            self.convolution = kind(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(self.layer(x).transpose(1, 2))

    check_engine(Net, _flat((1, 4)), 0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_features_for_samples_that_are_chosen() -> None:
    """Clusters of an adaptive softmax may have none."""

    def losses(model: nn.Module) -> Tensor:
        return -model(randn(B, 4), torch.tensor([0, 4, 7, 9, 3])).output

    check_engine(lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 10, [3, 6]), losses, 0)


class _Tokens(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, **options)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.table(tokens)))


TOKENS = torch.randint(0, 9, (B, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"sparse": True}])
@pytest.mark.parametrize("scatter", [True, False])
def test_embedding(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], scatter: bool
) -> None:
    if not scatter:
        monkeypatch.setattr("jdcore.graph._memory.CAPACITY", 1)
    check_engine(lambda: _Tokens(**options), lambda m: m(TOKENS).pow(2).sum((1, 2)), 0)
    check_engine(lambda: _Tokens(**options), lambda m: m(TOKENS).pow(2).sum(1)[:, :2], 0)
    check_engine(lambda: _Tokens(**options), lambda m: m(TOKENS).pow(2).sum((0, 1))[:3], None)


def test_sparse_embedding_gets_a_sparse_gradient() -> None:
    from jdcore.autogram import Engine

    table = nn.Embedding(9, 6, sparse=True)
    engine = Engine(table, batch_dim=0)
    engine.backward(table(TOKENS).pow(2).sum((1, 2)), torch.diag)
    assert table.weight.grad.is_sparse


def test_a_sparse_table_that_is_a_factor_too_gets_the_sum_of_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6, sparse=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens).sum(1) @ self.table.weight.T

    check_engine(Tied, lambda m: m(TOKENS).pow(2).sum(1), 0)
    check_engine(Tied, lambda m: m(TOKENS).pow(2).sum(0)[:3], None)
