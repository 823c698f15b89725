"""
Training as users do it: each loop is run twice, once with the library and once with gradients
computed row by row in float64 by plain autograd, and must end with the same parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jdcore
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward

Losses = Callable[[nn.Module, int], Sequence[Tensor]]
STEPS = 3


class Net(nn.Module):
    """A trunk with a normalisation layer and three heads, two of which share a layer."""

    def __init__(
        self, norm: nn.Module | None = None, wrap: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = norm or nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.between = nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.wrap = wrap

    def trunk(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.relu(self.norm(self.first(x)))))

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x) if self.wrap is None else self.wrap(self.trunk, x)

    def outputs(self, features: Tensor) -> list[Tensor]:
        middle = torch.sin(self.between(features))
        return [head(h) for head, h in zip(self.heads, (middle, middle, features), strict=True)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.outputs(self.features(x))


def _batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(10, 6, generator=generator)
    y = torch.randn(3, 10, 1, generator=generator)
    return x.to(dtype), y.to(dtype)


def _losses(model: nn.Module, step: int) -> list[Tensor]:
    x, targets = _batch(step, next(model.parameters()).dtype)
    outputs = model(x)
    return [
        (o.float() - t).square().mean() if o.dtype != torch.float64 else (o - t).square().mean()
        for o, t in zip(outputs, targets, strict=True)
    ]


def _row_by_row(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    rows = []
    for loss in losses:
        if not loss.requires_grad:
            rows.append(torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64))
            continue
        gradients = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
    return torch.stack(rows)


def _set_grads(parameters: Sequence[Tensor], vector: Tensor) -> None:
    pieces = vector.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        gradient = piece.view_as(parameter).to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _train_truth(model: nn.Module, losses: Losses = _losses) -> nn.Module:
    """Reference: float64, one row after the other, the same aggregator on the whole matrix."""
    model = copy.deepcopy(model).double()
    aggregator = jdcore.get_aggregator("upgrad")
    parameters = _trainable(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(STEPS):
        matrix = _row_by_row(losses(model, step), parameters)
        _set_grads(parameters, aggregator(matrix))
        optimizer.step()
        optimizer.zero_grad()
    return model


def _train(model: nn.Module, losses: Losses = _losses, **keywords: Any) -> None:
    aggregator = jdcore.get_aggregator("upgrad")
    optimizer = torch.optim.SGD(_trainable(model), lr=0.1)
    for step in range(STEPS):
        backward(losses(model, step), **keywords)
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()


def _vector(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def _assert_same(model: nn.Module, truth: nn.Module) -> None:
    pairs = zip(model.named_parameters(), truth.parameters(), strict=True)
    for (name, parameter), expected in pairs:
        error = (parameter.double() - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max(), name


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 8])
def test_backward(net: Net, chunk_size: int | None) -> None:
    truth = _train_truth(net)
    _train(net, parallel_chunk_size=chunk_size)
    _assert_same(net, truth)


def _mtl_truth(model: Net, present: Callable[[int], Iterable[int]] = lambda step: range(3)) -> Net:
    model = copy.deepcopy(model).double()
    aggregator = jdcore.get_aggregator("upgrad")
    shared = [*model.first.parameters(), *model.norm.parameters(), *model.second.parameters()]
    private = [*model.between.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        losses = _partial(_losses(model, step), present(step))
        _set_grads(shared, aggregator(_row_by_row(losses, shared)))
        _set_grads(private, _row_by_row(losses, private).sum(dim=0))
        optimizer.step()
        optimizer.zero_grad()
    return model


def _partial(losses: Sequence[Tensor], present: Iterable[int]) -> list[Tensor]:
    kept = set(present)
    return [loss if i in kept else torch.zeros(()) for i, loss in enumerate(losses)]


def _train_mtl(
    model: Net, present: Callable[[int], Iterable[int]] = lambda step: range(3), **keywords: Any
) -> None:
    aggregator = jdcore.get_aggregator("upgrad")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        x, targets = _batch(step)
        features = model.features(x)
        losses = [
            (output - target).square().mean()
            for output, target in zip(model.outputs(features), targets, strict=True)
        ]
        mtl_backward(_partial(losses, present(step)), features, **keywords)
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_mtl_backward_with_a_layer_shared_by_some_heads(net: Net, chunk_size: int | None) -> None:
    truth = _mtl_truth(net)
    _train_mtl(net, parallel_chunk_size=chunk_size)
    _assert_same(net, truth)


def test_tasks_that_are_absent_from_some_batches(net: Net) -> None:
    def present(step: int) -> list[int]:
        return [[0, 2], [1], [0, 1, 2]][step]

    truth = _mtl_truth(net, present)
    _train_mtl(net, present)
    _assert_same(net, truth)


def test_frozen_parameters_stay_and_unreached_ones_get_no_gradient(net: Net) -> None:
    net.first.weight.requires_grad_(False)
    frozen = net.first.weight.detach().clone()
    unused = net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    truth = _train_truth(net)
    _train(net)
    _assert_same(net, truth)
    assert torch.equal(net.first.weight, frozen)
    assert unused is None
    assert net.unused.grad is None


def test_groups_of_parameters_are_aggregated_apart(net: Net) -> None:
    aggregator = jdcore.get_aggregator("upgrad")

    def groups(model: Net) -> list[list[Tensor]]:
        trunk = [model.first, model.norm, model.second]
        return [
            [p for module in trunk for p in module.parameters()],
            [*model.between.parameters(), *model.heads.parameters()],
        ]

    truth = copy.deepcopy(net).double()
    for model in (truth, net):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            losses = _losses(model, step)
            if model is net:
                backward(losses)
            for group in groups(model):
                if model is net:
                    jac_to_grad(group, aggregator)
                else:
                    _set_grads(group, aggregator(_row_by_row(losses, group)))
            optimizer.step()
            optimizer.zero_grad()
    _assert_same(net, truth)


def test_accumulating_jacobians_sums_the_rows_of_several_batches(net: Net) -> None:
    def summed(model: nn.Module, step: int) -> list[Tensor]:
        pairs = zip(_losses(model, 2 * step), _losses(model, 2 * step + 1), strict=True)
        return [first + second for first, second in pairs]

    truth = _train_truth(net, summed)
    aggregator = jdcore.get_aggregator("upgrad")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        for half in (2 * step, 2 * step + 1):
            backward(_losses(net, half))
        jac_to_grad(net.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
    _assert_same(net, truth)


def test_accumulating_gradients_sums_the_updates_of_several_batches(net: Net) -> None:
    aggregator = jdcore.get_aggregator("upgrad")
    truth = copy.deepcopy(net).double()
    parameters = list(truth.parameters())
    for step in range(STEPS):
        _set_grads(parameters, aggregator(_row_by_row(_losses(truth, step), parameters)))
        backward(_losses(net, step))
        jac_to_grad(net.parameters(), aggregator)
    for parameter, expected in zip(net.parameters(), parameters, strict=True):
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["layer", "batch", "group"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_autocast(dtype: torch.dtype, norm: str, chunk_size: int | None) -> None:
    torch.manual_seed(0)
    norms = {"layer": nn.LayerNorm(8), "batch": nn.BatchNorm1d(8), "group": nn.GroupNorm(2, 8)}
    model = Net(norms[norm])
    before = _vector(model)
    truth = _train_truth(model)
    aggregator = jdcore.get_aggregator("upgrad")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=dtype):
            losses = _losses(model, step)
        backward(scaler.scale(losses), parallel_chunk_size=chunk_size)
        jac_to_grad(model.parameters(), aggregator)
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    moved = _vector(truth) - before
    # 8 and 11 bits of precision, amplified by the conditioning of the aggregation.
    tolerance = 0.2 if dtype == torch.bfloat16 else 0.02
    assert (_vector(model) - _vector(truth)).norm() <= tolerance * moved.norm()


def test_an_overflow_under_autocast_skips_the_step_as_with_plain_gradients(net: Net) -> None:
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    losses = [loss * 1e20 for loss in _losses(net, 0)]
    backward(scaler.scale(losses))
    jac_to_grad(net.parameters(), jdcore.get_aggregator("upgrad"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    for parameter, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_parameters_of_several_dtypes(net: Net) -> None:
    truth = _train_truth(net)
    net.second.double()
    net.trunk = lambda x: torch.tanh(  # type: ignore[method-assign]  # only for this test
        net.second(torch.relu(net.norm(net.first(x))).double()).float()
    )
    _train(net)
    assert net.second.weight.dtype == torch.float64
    _assert_same(net, truth)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mtl", [False, True])
def test_checkpointing(net: Net, use_reentrant: bool, mtl: bool) -> None:
    truth = _mtl_truth(net) if mtl else _train_truth(net)
    net.wrap = lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=use_reentrant)
    if mtl:
        trunk = [net.first, net.norm, net.second]
        _train_mtl(net, shared_params=[p for module in trunk for p in module.parameters()])
    else:
        _train(net, inputs=list(net.parameters()))
    _assert_same(net, truth)


def test_the_parameters_inside_a_reentrant_checkpoint_must_be_given(net: Net) -> None:
    net.wrap = lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(jdcore.ParameterError, match=r"`inputs` .* use_reentrant=False"):
        backward(_losses(net, 0))
    features = net.features(_batch(0)[0])
    losses = [output.mean() for output in net.outputs(features)]
    with pytest.raises(jdcore.ParameterError, match=r"`shared_params` .* use_reentrant=False"):
        mtl_backward(losses, features)


def test_rows_through_a_reentrant_checkpoint_leave_every_grad_alone(net: Net) -> None:
    net.wrap = lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=True)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    backward(_losses(net, 0), inputs=net.parameters())
    for parameter in net.parameters():
        assert parameter.grad.eq(7.0).all()
        assert parameter.jac.shape == (3, *parameter.shape)


@pytest.mark.parametrize("mtl", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_models(net: Net, compiler: str, mtl: bool) -> None:
    truth = _mtl_truth(net) if mtl else _train_truth(net)
    if mtl:
        net.wrap = torch.compile(lambda f, x: f(x), backend=compiler)
        _train_mtl(net)
    else:
        compiled = torch.compile(net, backend=compiler)
        _train(compiled)
    _assert_same(net, truth)
    torch._dynamo.reset()


def test_tied_weights(net: Net) -> None:
    net.between.weight = net.second.weight
    net.heads[1].weight = net.heads[0].weight
    truth = _train_truth(net)
    _train(net)
    assert net.between.weight is net.second.weight
    _assert_same(net, truth)


def test_weights_tied_between_trunk_and_heads_in_mtl_backward(net: Net) -> None:
    net.between.weight = net.second.weight
    truth = copy.deepcopy(net).double()
    aggregator = jdcore.get_aggregator("upgrad")
    for model in (truth, net):
        shared = [*model.first.parameters(), *model.norm.parameters(), *model.second.parameters()]
        private = [model.between.bias, *model.heads.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            x, targets = _batch(step, model.first.weight.dtype)
            features = model.features(x)
            pairs = zip(model.outputs(features), targets, strict=True)
            losses = [(output - target).square().mean() for output, target in pairs]
            if model is net:
                mtl_backward(losses, features)
                jac_to_grad(shared, aggregator)
            else:
                _set_grads(shared, aggregator(_row_by_row(losses, shared)))
                _set_grads(private, _row_by_row(losses, private).sum(dim=0))
            optimizer.step()
            optimizer.zero_grad()
    _assert_same(net, truth)


def test_a_non_leaf_input_that_retains_grad_gets_an_aggregated_gradient(net: Net) -> None:
    aggregator = jdcore.get_aggregator("upgrad")
    x, _ = _batch(0)
    features = net.features(x)
    features.retain_grad()
    losses = [output.square().mean() for output in net.outputs(features)]
    expected = aggregator(_row_by_row(losses, [features])).view_as(features)
    features.grad = None
    backward(losses, inputs=[features])
    jac_to_grad(features, aggregator)
    torch.testing.assert_close(features.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_an_inplace_change_that_invalidates_the_graph_gives_the_error_of_torch(net: Net) -> None:
    losses = _losses(net, 0)
    with torch.no_grad():
        net.second.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        backward(losses)
    assert type(caught.value) is RuntimeError
    for parameter in net.parameters():
        assert not hasattr(parameter, "jac")


def test_the_lean_step_trains_like_backward_and_jac_to_grad(net: Net) -> None:
    truth = _train_truth(net)
    weighting = jdcore.get_weighting("upgrad")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        gramian_backward(_losses(net, step), weighting)
        optimizer.step()
        optimizer.zero_grad()
    _assert_same(net, truth)
