"""What broke other ways of computing Gramians: right here, or an error before any number."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from jdcore import ParameterError, ParameterTypeError, RowByRowWarning
from jdcore.aggregation import GramianAggregator
from jdcore.autogram import Engine, backward, gramian
from jdcore.errors import UnservedGraphError
from tests.core.autogram.oracle import explicit_jacobian, randn, relative_error
from tests.functions import Redone
from tests.zoo.specimen import as_matrix

B = 4


def _identity() -> nn.Linear:
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    return net


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def _right(engine: Engine, losses: Tensor, parameters: list[Tensor]) -> None:
    jacobian = explicit_jacobian(losses, parameters)
    assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12


# -- samples that mix or change places -------------------------------------------------------------


def test_samples_that_change_places_in_the_first_batch() -> None:
    net = _identity()
    losses = net(_numbers(1.0, 2.0, 3.0))[torch.tensor([1, 0, 2])].squeeze(1)
    assert Engine(net, batch_dim=0).compute_gramian(losses).diag().tolist() == [4.0, 1.0, 9.0]


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8, 17, 64])
def test_random_permutations_between_layers(samples: int) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = Engine(net, batch_dim=0)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(samples, generator=generator)
        losses = net[2](net[1](net[0](randn(samples, 3)))[order]).square().sum(1)
        _right(engine, losses, list(net.parameters()))


def test_where_samples_go_is_seen_anew_at_every_call() -> None:
    net = _identity()
    engine = Engine(net, batch_dim=0)

    def losses(owners: list[int]) -> Tensor:
        return torch.zeros(2).index_add(
            0, torch.tensor(owners), net(_numbers(1.0, 2.0, 3.0, 4.0)).squeeze(1)
        )

    assert engine.compute_gramian(losses([0, 0, 1, 1])).tolist() == [[9.0, 21.0], [21.0, 49.0]]
    assert engine.compute_gramian(losses([0, 0, 0, 1])).tolist() == [[36.0, 24.0], [24.0, 16.0]]
    assert engine.compute_gramian(losses([1, 1, 0, 1])).tolist() == [[9.0, 21.0], [21.0, 49.0]]


def test_a_roll_by_another_number_is_another_kind_of_graph() -> None:
    net = nn.Linear(3, 2)
    engine = Engine(net, batch_dim=0)
    for shift in (0, 1, 2, 0):
        losses = (net(randn(B, 3)).roll(shift, 0) + 1.0).square().sum(1)
        _right(engine, losses, list(net.parameters()))


def _gated(net: nn.Module, bias: float) -> Tensor:
    """Sample 0 looks at sample 1 as well, where a rectifier lets it."""
    h = net(randn(B, 3))
    k = h.clone()
    k[0] = h[0] + torch.relu(h[1] + bias)
    return k.square().sum(1)


@pytest.mark.parametrize("first", [-100.0, 100.0])
def test_a_gate_that_is_closed_at_first(first: float) -> None:
    net = nn.Linear(3, 2)
    engine = Engine(net, batch_dim=0)
    for bias in (first, -first, first):
        _right(engine, _gated(net, bias), list(net.parameters()))


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("samples", [1, B])
def test_an_expert_that_no_sample_goes_to(samples: int, batch_dim: int | None) -> None:
    busy = nn.Linear(3, 3)
    idle = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv1d(1, 1, 3, padding=1))
    net = nn.ModuleList([busy, idle])
    x, here = randn(samples, 3), torch.ones(samples, dtype=torch.bool)

    def losses() -> Tensor:
        out = x.new_empty(samples, 3)
        out[here] = busy(x[here])
        out[~here] = idle(x[~here][:, None])[:, 0]
        return out.square().sum(1)

    engine = Engine(net, batch_dim=batch_dim)
    _right(engine, losses(), list(net.parameters()))
    losses().sum().backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    engine.backward(losses(), lambda _: torch.ones(samples))
    # Zero and not None, of which optimizers with a momentum make something else.
    assert all(grad is not None for grad in expected)
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-12)  # type: ignore[arg-type]


def test_losses_over_the_batch_after_losses_per_sample() -> None:
    net = nn.Linear(3, 2)
    engine = Engine(net, batch_dim=0)
    engine.compute_gramian(net(randn(B, 3)).log_softmax(1)[:, 0])
    z = net(randn(B, 3))
    with pytest.raises(UnservedGraphError, match="batch_dim=None"):
        engine.compute_gramian((z @ z.T).log_softmax(1).diagonal())


def test_samples_of_which_one_reaches_another_once_in_sixteen() -> None:
    net = nn.Linear(3, 2)
    h = net(randn(16, 3))
    k = h.clone()
    k[0] = h[0] - h[1]
    _right(Engine(net, batch_dim=0), k.square().sum(1), list(net.parameters()))


def test_tasks_that_cancel() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    loss = net(randn(B, 3)).squeeze(1)
    losses = torch.stack([loss, -loss], 1).flip(0)
    matrix = explicit_jacobian(losses, list(net.parameters()))
    got = Engine(net, batch_dim=0).compute_gramian(losses).permute(0, 1, 3, 2).reshape(2 * B, -1)
    assert relative_error(got, matrix @ matrix.T) < 1e-12


def test_an_outlier_does_not_hide_what_mixes() -> None:
    net = nn.Linear(3, 2)
    h = net(randn(B, 3) * torch.tensor([1e6, 1.0, 1.0, 1.0])[:, None])
    with pytest.raises(UnservedGraphError, match="mix"):
        Engine(net, batch_dim=0).compute_gramian((h - h.mean(0)).square().sum(1))


class _Sanitized(torch.autograd.Function):
    """Hides NaN from what shows where samples are, here also inside of the function itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inside: bool) -> Tensor:
        ctx.inside = inside
        return x.flip(0) if inside else x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = torch.nan_to_num(grads[0])
        return grad.flip(0) if ctx.inside else grad, None


class _Clipped(torch.autograd.Function):
    """Compares gradients, of which NaN is no larger than anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inside: bool) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        length = grads[0].norm()
        return grads[0] / length if length > 1e-3 else grads[0], None


class _Thresholded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inside: bool) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.where(grads[0].abs() > 1e-9, grads[0], 0.0), None


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize(
    ("function", "inside"),
    [(_Sanitized, False), (_Sanitized, True), (_Thresholded, False), (_Clipped, False)],
)
def test_mixing_behind_a_function_that_treats_nan_otherwise_than_numbers(
    function: Any, inside: bool, tasks: int
) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    hidden = net[0](randn(B, 3))
    # Another way to the same samples shows them apart.
    mixed = hidden + function.apply(hidden if inside else hidden.flip(0), inside)
    losses = net[2](mixed.tanh()).square()
    losses = losses.sum(1) if tasks == 1 else losses.T
    with pytest.warns(RowByRowWarning, match="treats NaN otherwise"):
        found = Engine(net, batch_dim=losses.ndim - 1).compute_gramian(losses)
    jacobian = explicit_jacobian(losses, list(net.parameters()))
    assert relative_error(as_matrix(found, losses.ndim), jacobian @ jacobian.T) < 1e-12


class _Coupled(torch.autograd.Function):
    """Mixes all samples but the first one, unless gradients are NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        [grad] = grads
        if grad.isnan().any():
            return grad
        return torch.cat([grad[:1], grad[1:] + grad[1:].flip(0)])


@pytest.mark.parametrize("features", [(), (1,)])
def test_a_long_row_does_not_hide_that_a_function_mixes_others(features: tuple[int, ...]) -> None:
    net = nn.Linear(3, 1)
    outputs = _Coupled.apply(net(randn(B, 3)).view(B, *features)).view(B)
    losses = outputs * torch.tensor([1e10, 1.0, 1.0, 1.0])
    with pytest.warns(RowByRowWarning, match="treats NaN otherwise"):
        found = Engine(net, batch_dim=0).compute_gramian(losses)
    jacobian = explicit_jacobian(losses, list(net.parameters()))
    torch.testing.assert_close(found, jacobian @ jacobian.T, rtol=1e-12, atol=0.0)


class _MixedInOneFeature(torch.autograd.Function):
    """Adds the last feature of one sample to that of another one, unless gradients are NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        if not grad.isnan().any():
            grad[3, -1] += grad[11, -1]  # two samples of the same place among eight
        return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_large_feature_does_not_hide_that_a_function_mixes_a_small_one(
    dtype: torch.dtype,
) -> None:
    net = nn.Linear(3, 2).to(dtype)
    outputs = _MixedInOneFeature.apply(net(randn(12, 3).to(dtype)))
    losses = outputs @ torch.tensor([1.0, 1e-9], dtype=dtype)
    with pytest.warns(RowByRowWarning, match="treats NaN otherwise"):
        gramian(losses, inputs=list(net.parameters()), batch_dim=0)


class _Scaled(torch.autograd.Function):
    """Right, with some gradients that have hardly any digits left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


@pytest.mark.parametrize("samples", [1, 7, 8, 65])
@pytest.mark.parametrize("smallest", [1.0, 1e-5, 1e-40, 1e-44])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_function_of_the_smallest_numbers_is_known_to_keep_samples_apart(
    dtype: torch.dtype, smallest: float, samples: int
) -> None:
    net = nn.Linear(3, 2).to(dtype)
    scale = torch.tensor([1.0, smallest], dtype=dtype)
    losses = _Scaled.apply(net(randn(samples, 3).to(dtype)), scale).sum(1)
    gramian(losses, inputs=list(net.parameters()), batch_dim=0)  # warnings are errors


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.where(ctx.saved_tensors[0] > 0, grads[0], 0.0)


def test_a_function_with_gradients_that_are_zero_hides_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    losses = net[1](_Masked.apply(net[0](randn(B, 3)))).square().sum(1)
    _right(Engine(net, batch_dim=0), losses, list(net.parameters()))


def test_prototypes_that_all_samples_share_are_served() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    prototypes, samples = net(randn(2, 3)), net(randn(B, 3) + 1.0)
    losses = torch.cdist(samples, prototypes).log_softmax(1)[:, 0]
    _right(Engine(net, batch_dim=0), losses, list(net.parameters()))


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_hook_of_a_parameter_acts_on_every_row(batch_dim: int | None) -> None:
    net = nn.Linear(2, 1, bias=False)
    net.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0]))
    engine = Engine(net, batch_dim=batch_dim)

    def losses() -> Tensor:
        return net(torch.tensor([[1.0, 5.0], [2.0, -7.0]])).squeeze(1)

    assert engine.compute_gramian(losses()).tolist() == [[1.0, 2.0], [2.0, 4.0]]
    engine.backward(losses(), lambda g: torch.ones(2))
    assert net.weight.grad.tolist() == [[3.0, 0.0]]


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
def test_a_hook_that_mixes_samples_and_comes_later() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = Engine(net, batch_dim=0)
    for hooked in (False, False, True, False, True):
        h = net[1](net[0](randn(B, 3)))
        if hooked:
            h.register_hook(lambda g: g.flip(0) + g)
        _right(engine, net[2](h).square().sum(1), list(net.parameters()))


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
def test_a_hook_that_moves_samples_and_comes_later() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = Engine(net, batch_dim=0)
    for hooked in (False, False, True, False, True):
        h = net[1](net[0](randn(B, 3)))
        if hooked:
            h.register_hook(lambda g: g.flip(0))
        _right(engine, net[2](h).square().sum(1), list(net.parameters()))


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
def test_hooks_that_read_values_or_scale() -> None:
    seen: list[float] = []

    def scaled(gradient: Tensor) -> Tensor:
        seen.append(float(gradient.sum()))
        return 2.0 * gradient

    for batch_dim in (0, None):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        h = net[0](randn(B, 3))
        h.register_hook(scaled)
        losses = net[2](net[1](h)).square().sum(1)
        _right(Engine(net, batch_dim=batch_dim), losses, list(net.parameters()))
    assert seen


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_hook_of_a_transposed_weight(batch_dim: int | None) -> None:
    net = nn.Linear(3, 2)

    def losses() -> Tensor:
        turned = net.weight.T
        turned.register_hook(lambda g: 2.0 * g)
        return (torch.tanh(randn(B, 3).requires_grad_()) @ turned).square().sum(1)

    _right(Engine(net, batch_dim=batch_dim), losses(), [net.weight])


# -- engines that would be stale -------------------------------------------------------------------


def test_parameters_are_looked_up_at_every_call() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    engine = Engine(net, batch_dim=0)
    net[0].weight = nn.Parameter(torch.randn(2, 3))
    _right(engine, net(randn(B, 3)).sum(1), list(net.parameters()))
    net.load_state_dict({k: 2 * v for k, v in net.state_dict().items()}, assign=True)
    _right(engine, net(randn(B, 3)).square().sum(1), list(net.parameters()))
    net[0] = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    _right(engine, net(randn(B, 3)).square().sum(1), list(net.parameters()))


def test_another_model_is_refused() -> None:
    net = nn.Linear(3, 2)
    engine = Engine(net, batch_dim=0)
    other = copy.deepcopy(net)
    for use in (engine.compute_gramian, lambda losses: engine.backward(losses, torch.diag)):
        with pytest.raises(ParameterError, match=r"`modules` .* got nothing behind"):
            use(other(randn(B, 3)).sum(1))
    with pytest.raises(ParameterError, match=r"`modules` .* got nothing behind"):
        Engine(batch_dim=0).compute_gramian(net(randn(B, 3)).sum(1))
    assert other.weight.grad is None


def test_a_forward_that_is_replaced_afterwards() -> None:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    engine = Engine(layer, batch_dim=0)
    original = layer.forward
    layer.forward = lambda x: 3.0 * original(x)
    losses = layer(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).squeeze(1)
    assert engine.compute_gramian(losses).tolist() == [[9.0, 18.0], [18.0, 36.0]]


def test_models_with_a_live_engine_can_be_saved_copied_and_scripted() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    engine = Engine(net, batch_dim=0)
    expected = engine.compute_gramian(net(randn(B, 3)).sum(1))
    torch.save(net, io.BytesIO())
    torch.save(engine, io.BytesIO())
    again = pickle.loads(pickle.dumps((net, engine)))
    assert torch.equal(again[1].compute_gramian(again[0](randn(B, 3)).sum(1)), expected)
    assert not net._forward_hooks
    assert not net[0]._forward_hooks


# -- functions that differentiate inside -----------------------------------------------------------


@pytest.mark.parametrize("batch_dim", [0, None])
def test_functions_that_differentiate_in_their_backward(batch_dim: int | None) -> None:
    net, w = nn.Linear(3, 4), nn.Parameter(torch.randn(4))
    net.register_parameter("w", w)
    losses = Redone.apply(net(randn(B, 3)), w).square().sum(1)
    engine = Engine(net, batch_dim=batch_dim)
    for _ in range(2):
        _right(engine, losses, [net.weight, net.bias, w])


@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_hook_that_differentiates_its_own_graph(batch_dim: int | None) -> None:
    net, out = nn.Linear(3, 3), nn.Linear(3, 1)

    def fixed_point(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros(len(x), 3)
            for _ in range(60):
                z = torch.tanh(0.3 * net(z) + x)
        z = torch.tanh(0.3 * net(z) + x)
        start = z.detach().requires_grad_()
        again = torch.tanh(0.3 * net(start) + x)

        def solve(gradient: Tensor) -> Tensor:
            total = gradient
            for _ in range(60):
                [product] = torch.autograd.grad(again, start, total, retain_graph=True)
                total = gradient + product
            return total

        z.register_hook(solve)
        return z

    losses = out(fixed_point(randn(B, 3))).squeeze(1)
    _right(Engine(net, out, batch_dim=batch_dim), losses, [*net.parameters(), *out.parameters()])


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _accumulated(ctx.layer, ctx.saved_tensors[0], grads[0]), None


class _KeptElsewhere(torch.autograd.Function):
    """The same, with a module that its context does not know of."""

    layer: ClassVar[nn.Module]

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        _KeptElsewhere.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _accumulated(_KeptElsewhere.layer, ctx.saved_tensors[0], grads[0]), None


def _accumulated(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient at the inputs of a layer, whose parameters get theirs by the way."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = layer(x)
    torch.autograd.backward(y, grad)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("function", [_Accumulating, _KeptElsewhere])
def test_a_function_that_accumulates_in_its_backward_is_refused(function: Any) -> None:
    first, hidden = nn.Linear(3, 3), nn.Linear(3, 3)
    hidden.weight.grad = torch.ones(3, 3)
    engine = Engine(first, hidden, batch_dim=0)
    losses = function.apply(first(randn(B, 3)), hidden).square().sum(1)
    with pytest.raises(UnservedGraphError, match=r"accumulates into \.grad"):
        engine.compute_gramian(losses)
    assert hidden.weight.grad.tolist() == [[1.0] * 3] * 3
    assert hidden.bias.grad is None


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize(
    "call",
    [
        lambda first, losses, dim: Engine(first, batch_dim=dim).compute_gramian(losses),
        lambda first, losses, dim: Engine(first, batch_dim=dim).backward(losses, torch.diag),
        lambda first, losses, dim: gramian(losses, batch_dim=dim),
        lambda first, losses, dim: backward(losses, torch.diag, batch_dim=dim),
    ],
)
def test_such_a_function_is_refused_where_nobody_asks_for_what_it_hides(
    call: Callable[[nn.Module, Tensor, int | None], Any], batch_dim: int | None
) -> None:
    """Its parameters would get the sum of all rows, and others a weight that leaves them out."""
    first, hidden = nn.Linear(3, 3), nn.Linear(3, 3)
    hidden.weight.grad = torch.ones(3, 3)
    losses = _Accumulating.apply(first(randn(B, 3)), hidden).square().sum(1)
    with pytest.raises(UnservedGraphError, match=r"accumulates into \.grad"):
        call(first, losses, batch_dim)
    assert hidden.weight.grad.tolist() == [[1.0] * 3] * 3
    assert hidden.bias.grad is first.weight.grad is None


# -- weightings ------------------------------------------------------------------------------------


class _Rounded(torch.autograd.Function):
    """A quantised weight, which keeps how large its gradients were."""

    seen: ClassVar[list[Tensor]] = []

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _Rounded.seen.append(grads[0].norm())
        return 2.0 * grads[0]


@pytest.mark.parametrize("batch_dim", [0, None])
def test_functions_of_weights_meet_one_gradient_at_a_time(batch_dim: int | None) -> None:
    net = nn.Linear(3, 2, bias=False)
    losses = (randn(B, 3) @ _Rounded.apply(net.weight).T).square().sum(1)
    _Rounded.seen.clear()
    _right(Engine(net, batch_dim=batch_dim), losses, [net.weight])
    lengths = torch.stack(_Rounded.seen)  # none of them is batched
    expected = explicit_jacobian(losses, [net.weight]).norm(dim=1) / 2.0
    assert all((lengths - length).abs().min() < 1e-12 for length in expected)


class _Matrix:
    def __call__(self, matrix: Tensor) -> Tensor:
        return matrix.sum(dim=0)

    def aggregate_blocks(self, blocks: list[Tensor]) -> tuple[list[Tensor], None]:
        return [block.sum(dim=0) for block in blocks], None


def test_aggregators_are_unwrapped_or_refused() -> None:
    net = nn.Linear(3, 2)
    engine = Engine(net, batch_dim=0)

    def weighting(g: Tensor) -> Tensor:
        return g.diagonal()

    ways: list[Callable[..., Tensor]] = [
        lambda losses, w: engine.backward(losses, w),
        lambda losses, w: backward(losses, w, batch_dim=0),
        lambda losses, w: backward(losses, w, batch_dim=None),
    ]
    for way in ways:
        plain = way(net(randn(B, 3)).sum(1), weighting)
        assert torch.allclose(way(net(randn(B, 3)).sum(1), GramianAggregator(weighting)), plain)
        with pytest.raises(ParameterTypeError, match="a Weighting or the aggregator of one"):
            way(net(randn(B, 3)).sum(1), _Matrix())


# -- numbers that leave their range ----------------------------------------------------------------


def test_scaled_float16_losses_that_overflow_are_no_mixing_of_samples() -> None:
    net = nn.Linear(3, 2).half()
    losses = net(randn(B, 3).half()).square().sum(1) * 65536.0
    gramian_of = Engine(net, batch_dim=0).compute_gramian(losses)
    assert not torch.isfinite(gramian_of).all()


@pytest.mark.parametrize("spoilt", [B, B - 1])
def test_losses_that_are_nan_are_no_mixing_of_samples(spoilt: int) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = randn(B, 3)
    x[:spoilt] = torch.nan
    losses = net(x).square().sum(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Each of .* since NaN in the gradients hides where")
        found = Engine(net, batch_dim=0).compute_gramian(losses)
    assert found[:spoilt].isnan().all()
    assert found[spoilt:, spoilt:].isfinite().all()


def test_one_loss_that_is_not_finite_concerns_no_other() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(B, 3)
    x[2] = torch.nan
    found = Engine(net, batch_dim=0).compute_gramian(net(x).squeeze(1))
    others = [0, 1, 3]
    jacobian = explicit_jacobian(net(x[others]).squeeze(1), list(net.parameters()))
    assert relative_error(found[others][:, others], jacobian @ jacobian.T) < 1e-12
    assert found[2].isnan().all()


# -- what may not be there -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.randn(3, dtype=torch.complex128), "complex"),
        (lambda: torch.randn(3, device="meta"), "meta"),
    ],
)
def test_unusual_parameters_are_refused(make: Callable[[], Tensor], kind: str) -> None:
    net = nn.Linear(3, 2)
    net.register_parameter("odd", nn.Parameter(make()))
    with pytest.raises(ParameterError, match=kind):
        Engine(net, batch_dim=0).compute_gramian(net(randn(B, 3)).sum(1))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_leaves_outside_of_the_modules_get_no_gradient(layout: torch.layout) -> None:
    net = nn.Linear(3, 2)
    edges = torch.eye(B).to_sparse(layout=layout).requires_grad_()
    losses = (edges @ net(randn(B, 3))).sum(1)
    engine = Engine(net, batch_dim=None)
    rows = explicit_jacobian(losses, list(net.parameters()))
    assert relative_error(engine.compute_gramian(losses), rows @ rows.T) < 1e-6
    with pytest.raises(ParameterError, match=r"`leaves behind output` must .*Freeze"):
        engine.backward(losses, lambda _: torch.ones(B))
    assert net.weight.grad is None


def test_sparse_leaves_that_are_not_asked_for_are_left_alone() -> None:
    edges = torch.eye(B).to_sparse().requires_grad_()
    w = randn(B, 3).requires_grad_()
    losses = (edges @ w).square().sum(1)
    backward(losses, lambda _: torch.ones(B), inputs=[w], batch_dim=None)
    torch.testing.assert_close(w.grad, 2 * w.detach())
    assert edges.grad is None


def test_functions_without_modules() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    found = gramian((x @ w).square(), batch_dim=0)
    rows = 2 * (x @ w).detach()[:, None] * x
    assert torch.allclose(found, rows @ rows.T)
    weights = backward((x @ w).square(), lambda g: torch.ones(3), inputs=w, batch_dim=0)
    assert weights.tolist() == [1.0, 1.0, 1.0]
    assert torch.allclose(w.grad, rows.sum(0))


def test_verification_names_every_parameter() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2))
    engine = Engine(net, batch_dim=0)
    losses = net(randn(B, 2, 4, 4)).square().sum(1)
    found = engine.verify(losses)
    assert [check.parameter for check in found] == [name for name, _ in net.named_parameters()]
    assert found.worst < 1e-12
    assert "Patches(1 x 4 rows of [3, 2, 3, 3], 1 images each)" in str(found)
    assert "closed form" in engine.explain(losses)


# -- two batches -----------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Whose gradient of the bias of keys is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.query(x), self.key(x), self.value(x)
        return nn.functional.scaled_dot_product_attention(*factors)


def test_verification_takes_no_rounding_for_an_error() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        net = _Attention()
        losses = net(torch.randn(B, 5, 4)).square().sum((1, 2))
        found = Engine(net, batch_dim=0).verify(losses)
        assert found.worst < 1e-12
        assert "key.bias" in [check.parameter for check in found]


def test_the_cross_gramian_is_that_of_both_jacobians() -> None:
    table, net = nn.Embedding(9, 6), nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh())
    convolution = nn.Conv1d(6, 4, 3)
    model = nn.ModuleList([table, net, convolution])
    parameters = list(model.parameters())

    def losses(seed: int) -> Tensor:
        tokens = torch.randint(0, 9, (B, 5), generator=torch.Generator().manual_seed(seed))
        h = net(net(table(tokens)))
        squares = convolution(h.mT).square().sum(2) + (h @ table.weight.T).sum((1, 2))[:, None]
        return squares.sum(0)

    first, second = losses(1), losses(2)
    expected = explicit_jacobian(first, parameters) @ explicit_jacobian(second, parameters).T
    got = Engine(model, batch_dim=None).cross_gramian(first, second)
    assert relative_error(got, expected) < 1e-12
    assert all(p.grad is None for p in parameters)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore::jdcore.RowByRowWarning")
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_of_all_layouts(layout: torch.layout, batch_dim: int | None) -> None:
    net = nn.Linear(2, 3)
    pieces = [randn(n, 2) for n in (3, 1, 2)]
    outputs = net(torch.nested.nested_tensor(pieces, layout=layout))
    losses = torch.stack([piece.square().sum() for piece in outputs.unbind()])
    _right(Engine(net, batch_dim=batch_dim), losses, list(net.parameters()))


class _OneMore(Tensor):
    """Samples of a class with an arithmetic of its own, which no backward pass of torch runs."""

    armed: ClassVar[bool] = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if not (cls.armed and isinstance(found, Tensor)):
            return found
        with torch._C.DisableTorchFunctionSubclass():
            return found + 1


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (B, 3)),
        (nn.Linear(3, 4), (B, 2, 3)),
        (nn.Conv2d(2, 3, 2), (B, 2, 4, 4)),
        (nn.LayerNorm(3), (B, 3)),
    ],
)
def test_samples_of_a_class_that_computes_otherwise(
    layer: nn.Module, shape: tuple[int, ...], batch_dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = copy.deepcopy(layer).double()
    parameters, weights = list(layer.parameters()), torch.arange(4.0)
    losses = layer(randn(*shape).as_subclass(_OneMore)).as_subclass(Tensor).flatten(1).sin().sum(1)
    jacobian = explicit_jacobian(losses, parameters)
    monkeypatch.setattr(_OneMore, "armed", True)
    engine = Engine(layer, batch_dim=batch_dim)
    assert relative_error(engine.compute_gramian(losses), jacobian @ jacobian.T) < 1e-12
    engine.backward(losses, lambda gramian: (gramian, weights)[1])
    assert [type(p.grad) for p in parameters] == [Tensor] * len(parameters)
    update = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert relative_error(update, weights @ jacobian) < 1e-12


@pytest.mark.parametrize(
    ("make", "shape", "batch_dim"),
    [
        (lambda: nn.Linear(3, 5), (B, 3), 0),
        (lambda: nn.Linear(3, 5), (B, 3), None),
        (lambda: nn.Linear(3, 5, bias=False), (B, 2, 3), 0),
        (lambda: nn.Embedding(9, 3), (B, 2), 0),
        (lambda: nn.Conv2d(8, 8, 3), (B, 8, 3, 3), 0),
    ],
)
def test_samples_that_a_weighting_writes_into(
    make: Callable[[], nn.Module], shape: tuple[int, ...], batch_dim: int | None
) -> None:
    layer = make()
    samples = torch.ones(shape, dtype=int if isinstance(layer, nn.Embedding) else None)

    def weighting(gramian: Tensor) -> Tensor:
        samples.zero_()  # a buffer that the next batch is read into
        return torch.ones_like(gramian[0])

    losses = layer(samples).flatten(1).sin().sum(1)
    with pytest.raises(UnservedGraphError, match="modified in place while the losses were weighed"):
        Engine(layer, batch_dim=batch_dim).backward(losses, weighting)
    assert all(p.grad is None for p in layer.parameters())
