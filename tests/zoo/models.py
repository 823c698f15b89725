"""Small models of every sort: what autograd records of them is what the engine has to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tests.functions import Scale
from tests.zoo.specimen import Specimen

B = 5

MODELS: dict[str, Callable[[], Specimen]] = {}


def _keep(make: Callable[[], Specimen]) -> Callable[[], Specimen]:
    def awake() -> Specimen:
        torch.manual_seed(0)
        specimen = make()
        wake(specimen.model)
        return specimen

    MODELS[make.__name__.strip("_")] = awake
    return make


def wake(model: nn.Module) -> None:
    """Moves parameters that start as zeros or ones, where mistakes would not be seen."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and (p.ndim <= 1 or not p.any()):
                p.add_(0.1 * torch.randn_like(p))


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


class _Parameters(nn.Module):
    """Bare parameters, normal numbers of the shapes given."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 2))


def _modules(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


# -- perceptrons and convolutions -----------------------------------------------------------------


@_keep
def _mlp() -> Specimen:
    layers = [nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)]
    return Specimen(nn.Sequential(*layers), (_randn(B, 6),))


@_keep
def _mlp_on_sequences() -> Specimen:
    layers = [nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 7, bias=False)]
    return Specimen(nn.Sequential(*layers), (_randn(B, 4, 6),))


@_keep
def _mlp_of_vectors_one_by_one() -> Specimen:
    """No batch anywhere but in the losses."""

    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([model(sample) for sample in x])

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    return Specimen(model, (_randn(B, 6),), outputs=outputs)


@_keep
def _mlp_of_one_sample() -> Specimen:
    return Specimen(nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 2)), (_randn(2, 6),))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.b, self.short = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.other, self.head = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)), inplace=True)
        x = F.relu_(self.other(self.b(x)) + self.short(x))
        return self.head(x.mean((2, 3)))


@_keep
def _residual() -> Specimen:
    return Specimen(_Residual(), (_randn(B, 3, 10, 10),), single=1e-5)


@_keep
def _convolutions() -> Specimen:
    layers = [
        nn.Conv2d(4, 8, 3, groups=4, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, groups=8, padding=2),
        nn.GELU(),
        nn.Conv2d(8, 6, 3, dilation=2, padding=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2),
        nn.Conv2d(4, 2, (3, 2), stride=(2, 1), padding="valid"),
    ]
    return Specimen(nn.Sequential(*layers), (_randn(B, 4, 7, 8),))


@_keep
def _convolutions_of_one_and_three_dimensions() -> Specimen:
    layers = [
        nn.Conv1d(3, 4, 3, padding=1, dilation=1),
        nn.ReLU(),
        nn.ConvTranspose1d(4, 4, 3, stride=2),
        nn.Unflatten(2, (1, 3, -1)),
        nn.Conv3d(4, 4, (1, 2, 2), groups=2),
        nn.ELU(),
        nn.ConvTranspose3d(4, 2, (2, 1, 1), bias=False),
    ]
    return Specimen(nn.Sequential(*layers), (_randn(B, 3, 7),))


@_keep
def _padded_and_pooled_convolutions() -> Specimen:
    layers = [
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
        nn.PixelShuffle(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(1, 2, 4, stride=3),
        nn.AvgPool2d(2, ceil_mode=True),
    ]
    return Specimen(nn.Sequential(*layers), (_randn(B, 3, 6, 6),))


@_keep
def _channels_last() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.to(memory_format=torch.channels_last))

    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 3)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return Specimen(model, (_randn(B, 3, 6, 6),), outputs=outputs)


@_keep
def _locally_connected() -> Specimen:
    """Patches by unfold, another kernel at every place."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, stride=2)
        return torch.einsum("bpl,plo->blo", patches, model.kernel).relu() + model.bias

    return Specimen(
        _Parameters(kernel=(18, 4, 3), bias=(4, 3)), (_randn(B, 2, 5, 5),), outputs=outputs
    )


# -- norms, activations with parameters -----------------------------------------------------------


@_keep
def _norms() -> Specimen:
    layers = [
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(4),
        nn.LayerNorm([4, 5, 5]),
        nn.RMSNorm(5),
        nn.GroupNorm(2, 4),
        nn.PReLU(),
        nn.LocalResponseNorm(2),
    ]
    return Specimen(nn.Sequential(*layers).eval(), (_randn(B, 3, 5, 5),))


@_keep
def _instance_norm_in_training() -> Specimen:
    layers = [nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return Specimen(nn.Sequential(*layers), (_randn(B, 3, 6, 6),))


@_keep
def _batch_norm_in_training() -> Specimen:
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)]
    return Specimen(nn.Sequential(*layers), (_randn(B, 4),), mixes=True)


@_keep
def _norms_by_hand() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        y = x @ model.weight
        y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, keepdim=True) + 1e-5)
        y = y * model.gain + model.shift
        return y * y.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + model.other)

    model = _Parameters(weight=(4, 6), gain=(6,), shift=(6,), other=(6,))
    return Specimen(model, (_randn(B, 3, 4),), outputs=outputs)


@_keep
def _layer_scale_and_gates() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        y = x * model.scale + model.gate.sigmoid() * torch.addcmul(x, x, model.scale)
        y = torch.lerp(y, x, model.blend.expand_as(x)) + x.pow(2) / (1 + model.divisor.square())
        return torch.where(x > 0, y * model.positive, y.exp() ** model.power.square())

    shapes: dict[str, tuple[int, ...]] = {"scale": (4,), "gate": (3, 1), "blend": (1, 3, 4)}
    shapes |= {"divisor": (), "positive": (1, 1, 1), "power": (1, 4)}
    return Specimen(_Parameters(**shapes), (_randn(B, 3, 4),), outputs=outputs)


# -- embeddings, tied and shared parameters -------------------------------------------------------


@_keep
def _positions_shared_by_samples() -> Specimen:
    """A table of positions is looked up once for all samples, [1, T]."""

    def outputs(model: Any, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        hidden = model["tokens"](tokens) + model["positions"](positions)
        return model["head"](hidden.tanh())

    model = _modules(
        tokens=nn.Embedding(9, 6, padding_idx=0),
        positions=nn.Embedding(12, 6),
        head=nn.Linear(6, 2),
    )
    return Specimen(model, (torch.randint(9, (B, 7)),), outputs=outputs)


@_keep
def _positions_as_parameters() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        token = model.cls.expand(len(x), -1, -1)
        y = torch.cat([token, x, model.register.repeat(len(x), 1, 1)], 1) + model.positions
        y = y + F.interpolate(model.grid[None], size=8, mode="linear")[0].T
        return (y @ model.weight).tanh()

    model = _Parameters(
        cls=(1, 1, 4), register=(2, 4), positions=(1, 8, 4), grid=(4, 3), weight=(4, 4)
    )
    return Specimen(model, (_randn(B, 5, 4),), outputs=outputs)


@_keep
def _relative_positions() -> Specimen:
    """Windows of attention with a table of biases, as in Swin."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        index = torch.arange(4)[:, None] - torch.arange(4)[None] + 3
        windows = x.view(B, 4, 2, 4, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4)
        q, k, v = model["qkv"](windows).view(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        bias = model["table"].weight[index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        scores = (q @ k.mT + bias[None]).softmax(-1)
        return (scores @ v).transpose(1, 2).reshape(B, -1)

    model = _modules(table=nn.Embedding(7, 2), qkv=nn.Linear(4, 12))
    return Specimen(model, (_randn(B, 8, 8, 4),), outputs=outputs)


@_keep
def _tied_embedding() -> Specimen:
    def outputs(model: Any, tokens: Tensor) -> Tensor:
        hidden = model["layer"](model["table"](tokens)).tanh()
        return F.linear(hidden, model["table"].weight).log_softmax(-1)

    model = _modules(table=nn.Embedding(9, 6), layer=nn.Linear(6, 6))
    return Specimen(model, (torch.randint(9, (B, 7)),), outputs=outputs)


@_keep
def _bags() -> Specimen:
    def outputs(model: Any, tokens: Tensor, x: Tensor) -> Tensor:
        bags = [model[how](tokens) for how in ("mean", "sum", "max")]
        offsets = torch.arange(0, tokens.numel(), tokens.shape[1])
        flat = F.embedding_bag(tokens.flatten(), model["mean"].weight, offsets, mode="sum")
        return model["bilinear"](torch.cat([*bags, flat], 1), x)

    tables = {how: nn.EmbeddingBag(8, 3, mode=how) for how in ("mean", "sum", "max")}
    model = _modules(**tables, bilinear=nn.Bilinear(12, 4, 2))
    return Specimen(model, (torch.randint(8, (B, 5)), _randn(B, 4)), outputs=outputs)


@_keep
def _a_layer_used_thrice() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        y = model["layer"](x).tanh()
        y = model["layer"](y).relu() + x
        return model["norm"](model["layer"](model["norm"](y)))

    model = _modules(layer=nn.Linear(6, 6), norm=nn.LayerNorm(6))
    return Specimen(model, (_randn(B, 3, 6),), outputs=outputs)


@_keep
def _weight_used_as_itself_and_transposed() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        code = (x @ model.weight + model.bias).relu()
        return code @ model.weight.T + code.sum(1, keepdim=True) * model.weight.mean()

    model = _Parameters(weight=(6, 4), bias=(4,))
    return Specimen(model, (_randn(B, 6),), outputs=outputs)


@_keep
def _decay_in_the_losses() -> Specimen:
    """Each loss holds a term of the parameters alone, the same for all samples."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        return model(x) + 0.1 * sum(p.square().sum() for p in model.parameters())

    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    return Specimen(model, (_randn(B, 5),), outputs=outputs)


@_keep
def _a_parameter_per_sample() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        return (x + model.own) @ model.weight + model.own[torch.arange(B), 0][:, None]

    return Specimen(_Parameters(own=(B, 4), weight=(4, 3)), (_randn(B, 4),), outputs=outputs)


@_keep
def _rows_of_a_table_by_sample() -> Specimen:
    """Variational autodecoders and knowledge graphs: codes of samples, repeated and shuffled."""

    def outputs(model: Any, index: Tensor, x: Tensor) -> Tensor:
        code = model.codes[index] * model.codes.index_select(0, index.flip(0)).flip(0)
        return (
            torch.cat([code, x], 1) @ model.weight + model.codes[index[:, None], :2].sum(1)[:, :1]
        )

    model = _Parameters(codes=(6, 4), weight=(7, 2))
    index = torch.tensor([3, 3, 0, 5, 1])
    return Specimen(model, (index, _randn(B, 3)), outputs=outputs)


# -- recurrent networks ---------------------------------------------------------------------------


def _recurrent(model: nn.Module, first: bool = True) -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        sequence, last = model(x)
        hidden = last[0] if isinstance(last, tuple) else last
        whole = sequence if first else sequence.transpose(0, 1)
        return torch.cat([whole.flatten(1), hidden.transpose(0, 1).flatten(1)], 1)

    return Specimen(model, (_randn(*((B, 6, 4) if first else (6, B, 4))),), outputs=outputs)


@_keep
def _lstm() -> Specimen:
    return _recurrent(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True))


@_keep
def _lstm_with_projection() -> Specimen:
    return _recurrent(nn.LSTM(4, 5, batch_first=True, proj_size=3))


@_keep
def _gru() -> Specimen:
    return _recurrent(nn.GRU(4, 5, 2), first=False)


@_keep
def _rnn() -> Specimen:
    return _recurrent(nn.RNN(4, 5, batch_first=True, nonlinearity="relu", bias=False))


@_keep
def _cells() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        h = model["start"].weight.expand(len(x), -1)
        c = torch.zeros_like(h)
        for step in x.unbind(1):
            h, c = model["lstm"](step, (h, c))
            h = model["gru"](h, h)
        return h

    model = _modules(lstm=nn.LSTMCell(4, 5), gru=nn.GRUCell(5, 5), start=nn.Embedding(1, 5))
    return Specimen(model, (_randn(B, 3, 4),), outputs=outputs)


@_keep
def _packed_sequences() -> Specimen:
    """Shorter sequences leave the batch early, and samples are sorted by length."""

    def outputs(model: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        padded, _ = pad_packed_sequence(model["rnn"](packed)[0], batch_first=True)
        return model["head"](padded)

    model = _modules(rnn=nn.GRU(4, 5, batch_first=True), head=nn.Linear(5, 2))
    return Specimen(model, (_randn(B, 6, 4), torch.tensor([3, 6, 1, 6, 2])), outputs=outputs)


# -- attention ------------------------------------------------------------------------------------


@_keep
def _transformer() -> Specimen:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Specimen(encoder, (_randn(B, 6, 8),))


@_keep
def _transformer_with_dropout_and_samples_second() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).transpose(0, 1)

    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Specimen(encoder, (_randn(6, B, 8),), outputs=outputs)


@_keep
def _encoder_and_decoder() -> Specimen:
    def outputs(model: Any, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=target.dtype)
        return model(source, target, tgt_mask=mask)

    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    return Specimen(model, (_randn(B, 5, 8), _randn(B, 4, 8)), outputs=outputs)


@_keep
def _attention_with_biases_of_keys() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, x, x, need_weights=False)[0]

    attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    return Specimen(attention, (_randn(B, 5, 8),), outputs=outputs)


@_keep
def _attention_across_with_padding() -> Specimen:
    def outputs(model: nn.Module, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(y.shape[1])[None] >= lengths[:, None]
        return model(x, y, y, key_padding_mask=padding)[0]

    attention = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
    inputs = (_randn(B, 5, 8), _randn(B, 3, 3), torch.tensor([1, 3, 2, 3, 1]))
    return Specimen(attention, inputs, outputs=outputs)


@_keep
def _learned_queries() -> Specimen:
    """Perceiver and DETR: queries are parameters, the same for all samples."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        queries = model["queries"].weight.expand(len(x), -1, -1)
        return model["attention"](queries, x, x, need_weights=False)[0] + queries

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = _modules(attention=attention, queries=nn.Embedding(3, 8))
    return Specimen(model, (_randn(B, 5, 8),), outputs=outputs)


@_keep
def _rotary_grouped_attention() -> Specimen:
    """Rotated queries, and keys shared by heads, as in Llama."""

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1]).to(x)
        a, b = x.chunk(2, -1)
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1
        )

    def outputs(model: Any, x: Tensor) -> Tensor:
        q = rotated(model["q"](x).view(B, -1, 4, 4).transpose(1, 2))
        k, v = model["kv"](x).view(B, -1, 2, 2, 4).permute(2, 0, 3, 1, 4)
        k, v = (
            rotated(k).repeat_interleave(2, 1),
            v[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return model["out"](y.transpose(1, 2).flatten(2))

    model = _modules(q=nn.Linear(8, 16), kv=nn.Linear(8, 16, bias=False), out=nn.Linear(16, 8))
    return Specimen(model, (_randn(B, 3, 8),), outputs=outputs)


# -- weights that are derived from parameters -----------------------------------------------------


@_keep
def _lora() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        return (F.linear(x, model.base) + 0.5 * (x @ model.down.T) @ model.up.T).tanh()

    model = _Parameters(base=(6, 7), down=(2, 7), up=(6, 2))
    model.base.requires_grad_(False)  # type: ignore[union-attr]
    return Specimen(model, (_randn(B, 4, 7),), outputs=outputs)


@_keep
def _merged_lora() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        return F.linear(x, model.base + 0.5 * model.up @ model.down).tanh()

    model = _Parameters(base=(6, 7), down=(2, 7), up=(6, 2))
    model.base.requires_grad_(False)  # type: ignore[union-attr]
    return Specimen(model, (_randn(B, 4, 7),), outputs=outputs)


@_keep
def _weight_norm() -> Specimen:
    norm = parametrizations.weight_norm
    layers = [norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(64, 3))]
    return Specimen(nn.Sequential(*layers), (_randn(B, 3, 6, 6),))


@_keep
def _spectral_norm() -> Specimen:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh())
    model(_randn(3, 6))
    return Specimen(model.eval(), (_randn(B, 6),))


@_keep
def _orthogonal_and_symmetric() -> Specimen:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).T

    layers = [nn.Linear(5, 5), nn.Tanh(), parametrizations.orthogonal(nn.Linear(5, 5))]
    parametrize.register_parametrization(layers[0], "weight", Symmetric())
    return Specimen(nn.Sequential(*layers), (_randn(B, 5),))


@_keep
def _quantised_straight_through() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        step = model.step.abs() + 0.1
        rounded = model.weight + ((model.weight / step).round() * step - model.weight).detach()
        return (x @ rounded).relu() * step

    return Specimen(_Parameters(weight=(6, 3), step=(1,)), (_randn(B, 6),), outputs=outputs)


@_keep
def _split_and_stacked_weights() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        a, b, c = model.packed.split([2, 3, 3])
        stacked = torch.cat([c, a * 2, b[:1], model.packed[4:6].flip(0)])
        bias = torch.stack([model.one, model.one, model.two]).flatten()[:8]
        return F.linear(F.linear(x, a).sum(1, keepdim=True) + x, stacked, bias)

    return Specimen(
        _Parameters(packed=(8, 4), one=(3,), two=(3,)), (_randn(B, 4),), outputs=outputs
    )


@_keep
def _functional_parameters() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        moved = {name: 0.9 * p for name, p in model.named_parameters()}
        return functional_call(model, moved, (x,))

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return Specimen(model, (_randn(B, 6),), outputs=outputs)


@_keep
def _half_frozen() -> Specimen:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return Specimen(model, (_randn(B, 4),))


@_keep
def _zero_at_first() -> Specimen:
    """Gradients are zero below a layer of zeros; the shares are not to be mistaken for absent."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        return F.linear(model(x), torch.zeros(3, 3, dtype=x.dtype)) + model(x)[:, :1]

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return Specimen(model, (_randn(B, 4),), outputs=outputs)


# -- mixtures, sets and graphs --------------------------------------------------------------------


@_keep
def _einsum_layers() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        gate = torch.einsum("btd,dhe->bthe", x, model.gate).tanh()
        value = torch.einsum("btd,dhe->bthe", x, model.value)
        return torch.einsum("bthe,heo->bto", gate * value, model.out)

    model = _Parameters(gate=(4, 3, 5), value=(4, 3, 5), out=(3, 5, 2))
    return Specimen(model, (_randn(B, 6, 4),), outputs=outputs)


@_keep
def _all_experts() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        first = torch.einsum("btd,edo->beto", x, model.experts).tanh().mean(1)
        second = torch.matmul(x[:, None], model.experts).relu().sum(1)
        third = torch.bmm(x.transpose(0, 1), model.experts.repeat(2, 1, 1)).transpose(0, 1)
        return first + second + third

    return Specimen(_Parameters(experts=(3, 4, 5)), (_randn(B, 6, 4),), outputs=outputs)


@_keep
def _routed_experts() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        best, chosen = model["gate"](tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(model["experts"]):
            index = (chosen == number).nonzero()[:, 0]
            y = y.index_add(0, index, expert(tokens[index]) * best[index, None])
        return y.view_as(x)

    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = _modules(gate=nn.Linear(4, 3), experts=experts)
    return Specimen(model, (_randn(B, 6, 4),), outputs=outputs)


@_keep
def _deep_set() -> Specimen:
    """Sets of different sizes in one long list, pooled by sample."""

    def outputs(model: Any, x: Tensor, owner: Tensor) -> Tensor:
        hidden = model["element"](x).relu()
        pooled = torch.zeros(B, 6, dtype=x.dtype).index_add(0, owner, hidden)
        largest = torch.full((B, 6), -9.0, dtype=x.dtype).scatter_reduce(
            0, owner[:, None].expand(-1, 6), hidden, "amax"
        )
        return model["whole"](torch.cat([pooled, largest], 1))

    model = _modules(element=nn.Linear(3, 6), whole=nn.Linear(12, 2))
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 2, 3, 4, 4])
    return Specimen(model, (_randn(10, 3), owner), outputs=outputs)


@_keep
def _graph_network() -> Specimen:
    """One graph per sample, all in one list of nodes and edges; nodes of samples interleaved."""

    def outputs(model: Any, x: Tensor, edges: Tensor, owner: Tensor) -> Tensor:
        for layer in model["layers"]:
            messages = layer(torch.cat([x[edges[0]], x[edges[1]]], 1)).tanh()
            x = model["norm"](x + torch.zeros_like(x).index_add(0, edges[1], messages))
        counts = torch.bincount(owner, minlength=B).to(x)[:, None]
        pooled = torch.zeros(B, 4, dtype=x.dtype).scatter_add(0, owner[:, None].expand(-1, 4), x)
        return model["head"](pooled / counts)

    owner = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 3, 3])
    pairs = [(i, j) for i in range(13) for j in range(13) if i != j and owner[i] == owner[j]]
    layers = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    model = _modules(layers=layers, norm=nn.LayerNorm(4), head=nn.Linear(4, 3))
    return Specimen(model, (_randn(13, 4), torch.tensor(pairs).T, owner), outputs=outputs)


@_keep
def _dense_graph_network() -> Specimen:
    def outputs(model: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        x = torch.bmm(adjacency, model["first"](x)).relu()
        return model["second"](torch.matmul(adjacency.mT, x)).amax(1)

    model = _modules(first=nn.Linear(3, 5), second=nn.Linear(5, 2))
    return Specimen(model, (_randn(B, 4, 3), torch.rand(B, 4, 4)), outputs=outputs)


@_keep
def _samples_shuffled_and_put_back() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        order = torch.tensor([3, 0, 4, 1, 2])
        hidden = model[0](x)[order].relu()
        return model[1](hidden)[order.argsort()]

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    return Specimen(model, (_randn(B, 4),), outputs=outputs)


@_keep
def _samples_in_chunks() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([model(part) for part in x.split([2, 1, 2])])

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return Specimen(model, (_randn(B, 4),), outputs=outputs)


@_keep
def _views_of_samples_in_one_batch() -> Specimen:
    """Siamese: two views of each sample go through the model in one batch."""

    def outputs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, b = model(torch.cat([x, y])).chunk(2)
        return F.normalize(a, dim=1) * F.normalize(b, dim=1)

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8))
    return Specimen(model, (_randn(B, 4), _randn(B, 4)), outputs=outputs)


@_keep
def _samples_in_the_last_dimension() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        hidden = (model.first @ x.flatten(1).T + model.bias[:, None]).relu()
        return (model.second @ hidden).T

    model = _Parameters(first=(5, 6), bias=(5,), second=(3, 5))
    return Specimen(model, (_randn(B, 2, 3),), outputs=outputs)


@_keep
def _samples_inside_a_dimension() -> Specimen:
    """Time and samples, and heads and samples, in one dimension each."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        flat = model["first"](x.transpose(0, 1).reshape(-1, 4)).relu()
        heads = flat.view(3, B, 2, 3).permute(1, 2, 0, 3).reshape(B * 2, 3, 3)
        mixed = torch.bmm(heads, heads.mT).softmax(-1) @ heads
        return model["second"](mixed.view(B, 2, 3, 3).transpose(1, 2).reshape(-1, 6)).view(B, -1)

    model = _modules(first=nn.Linear(4, 6), second=nn.Linear(6, 2))
    return Specimen(model, (_randn(B, 3, 4),), outputs=outputs)


@_keep
def _triplets() -> Specimen:
    """A loss per sample on positives and negatives that belong to it."""

    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        anchor, positive, negative = model(x).unbind(1)
        near = F.pairwise_distance(anchor, positive)
        return torch.stack([near, F.pairwise_distance(anchor, negative)], 1)

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return Specimen(model, (_randn(B, 3, 4),), outputs=outputs)


# -- derivatives, functions, checkpoints ----------------------------------------------------------


@_keep
def _pinn() -> Specimen:
    """The residual of a differential equation: derivatives by the inputs are in the losses."""

    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = model(x)
        [slope] = torch.autograd.grad(u.sum(), x, create_graph=True)
        [second] = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        return torch.cat([slope[:, 1:] - 0.3 * second[:, :1] + u * slope[:, :1], u], 1)

    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    return Specimen(model, (_randn(B, 2),), outputs=outputs)


@_keep
def _gradient_penalty() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        score = model(x).flatten(1)
        [slope] = torch.autograd.grad(score.sum(), x, create_graph=True)
        return torch.cat([score, (slope.flatten(1).norm(dim=1, keepdim=True) - 1).square()], 1)

    layers = [nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(27, 1)]
    return Specimen(nn.Sequential(*layers), (_randn(B, 1, 5, 5),), outputs=outputs)


@_keep
def _checkpoints() -> Specimen:
    def outputs(model: Any, x: Tensor, image: Tensor) -> Tensor:
        inner = checkpoint(model["mlp"], x, use_reentrant=False)[..., :6]
        y = model["head"](checkpoint(model["mlp"], inner, use_reentrant=False)).flatten(1)
        return torch.cat([y, checkpoint(model["cnn"], image, use_reentrant=False)], 1)

    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())
    model = _modules(mlp=mlp, head=nn.Linear(8, 3), cnn=_Residual())
    inputs = (_randn(B, 4, 6), _randn(B, 3, 10, 10))
    return Specimen(model, inputs, outputs=outputs)


@_keep
def _checkpoint_of_nameless_operations() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            y = x @ model.weight
            return torch.lerp(y, model.bias.expand_as(y), 0.3) * torch.atan2(y, model.bias)

        return checkpoint(inside, x, use_reentrant=False)

    model = _Parameters(weight=(4, 3), bias=(3,))
    return Specimen(model, (_randn(B, 4),), outputs=outputs)


class _ScaleWithVmap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(0)


@_keep
def _custom_functions() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        y = Scale.apply(x @ model.weight, model.scale)
        y = _ScaleWithVmap.apply(y.tanh(), model.other)
        return y * _ScaleWithVmap.apply(model.scale[None], model.other)

    model = _Parameters(weight=(4, 4), scale=(4,), other=(4,))
    return Specimen(model, (_randn(B, 4),), outputs=outputs)


class _Implicit(torch.autograd.Function):
    """Differentiates inside of its own backward, as solvers of differential equations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.tanh(x @ weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = torch.tanh(x @ weight)
        return torch.autograd.grad(y, (x, weight), grad)  # type: ignore[return-value]


@_keep
def _implicit_layer() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        return _Implicit.apply(_Implicit.apply(x, model.first), model.second).square()

    return Specimen(_Parameters(first=(4, 4), second=(4, 3)), (_randn(B, 4),), outputs=outputs)


@_keep
def _hooks_on_activations() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        hidden = model[0](x)
        hidden.register_hook(lambda g: g * 2)
        hidden.retain_grad()
        return model[1](hidden.tanh())

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    return Specimen(model, (_randn(B, 4),), outputs=outputs)


@_keep
def _in_place() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        y = model["head"](model["body"](x).flatten(1))
        y.mul_(model["scale"].weight[0])
        y.add_(model["scale"].weight[1])
        y[:, 0] = y[:, 1] * 2
        return F.leaky_relu_(y)

    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    model = _modules(body=body, head=nn.Linear(64, 3), scale=nn.Embedding(2, 3))
    return Specimen(model, (_randn(B, 3, 6, 6),), outputs=outputs)


@_keep
def _written_into_a_buffer() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        buffer = torch.zeros(B, 4, 3, dtype=x.dtype)
        for step in range(4):
            buffer[:, step] = model(x[:, step]) + buffer[:, step - 1] * 0.5
        return buffer

    return Specimen(nn.Linear(4, 3), (_randn(B, 4, 4),), outputs=outputs)


@_keep
def _losses_under_vmap() -> Specimen:
    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        return torch.vmap(model, randomness="error")(x)

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return Specimen(model, (_randn(B, 3, 4),), outputs=outputs)


@_keep
def _fourier() -> Specimen:
    """Complex numbers between real parameters and real losses."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(model["lift"](x), dim=1)
        filters = torch.view_as_complex(model["filters"].weight.view(4, 5, 2))
        y = torch.fft.irfft(waves * filters, n=6, dim=1)
        return torch.cat([y, torch.fft.fft(y, dim=-1).abs()], 1)

    model = _modules(lift=nn.Linear(3, 5), filters=nn.Embedding(4, 10))
    return Specimen(model, (_randn(B, 6, 3),), outputs=outputs)


@_keep
def _state_space() -> Specimen:
    """A scan over time with a state per sample, as in Mamba."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        step = F.softplus(x @ model.step)
        keep = torch.exp(-step[..., None] * model.decay.exp())
        enter = step[..., None] * (x @ model.enter)[:, :, None]
        state, seen = torch.zeros(B, 4, 3, dtype=x.dtype), []
        for t in range(x.shape[1]):
            state = keep[:, t] * state + enter[:, t] * x[:, t, :, None]
            seen.append(torch.einsum("bdn,n->bd", state, model.leave))
        return torch.stack(seen, 1) + x * model.skip

    model = _Parameters(step=(4, 4), decay=(4, 3), enter=(4, 3), leave=(3,), skip=(4,))
    return Specimen(model, (_randn(B, 4, 4),), outputs=outputs)


@_keep
def _hypernetwork() -> Specimen:
    """The weights of a layer come from the sample itself."""

    def outputs(model: Any, x: Tensor) -> Tensor:
        weights = model["maker"](x).view(B, 4, 3)
        return torch.bmm(x[:, None], weights)[:, 0] + torch.einsum("bi,bio->bo", x.sin(), weights)

    return Specimen(_modules(maker=nn.Linear(4, 12)), (_randn(B, 4),), outputs=outputs)


@_keep
def _linear_algebra() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        kernel = x @ x.mT + model.noise.square() * torch.eye(3, dtype=x.dtype)
        half = torch.linalg.cholesky(kernel)
        solved = torch.linalg.solve(kernel, x @ model.weight)
        return torch.cat([solved.flatten(1), half.diagonal(dim1=1, dim2=2).log()], 1)

    model = _Parameters(noise=(1,), weight=(4, 2))
    model.noise.data.fill_(2.0)  # type: ignore[union-attr,operator]
    return Specimen(model, (_randn(B, 3, 4),), outputs=outputs)


@_keep
def _sorted_and_chosen_within_samples() -> Specimen:
    def outputs(model: Any, x: Tensor) -> Tensor:
        y = model(x)
        top = y.topk(2, dim=1).values
        ordered = y.sort(dim=1).values.cumsum(1)
        index = y.argmax(1, keepdim=True)
        return torch.cat([top, ordered, y.gather(1, index), y.roll(1, 1) * y.flip(1)], 1)

    return Specimen(nn.Linear(4, 6), (_randn(B, 4),), outputs=outputs)


@_keep
def _grid_samples() -> Specimen:
    """A spatial transformer."""

    def outputs(model: Any, image: Tensor) -> Tensor:
        theta = model["find"](image.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        return model["read"](F.grid_sample(image, grid, align_corners=False))

    model = _modules(find=nn.Linear(32, 6), read=nn.Conv2d(2, 2, 3))
    return Specimen(model, (_randn(B, 2, 4, 4),), outputs=outputs)
