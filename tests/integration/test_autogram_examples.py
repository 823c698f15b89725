"""Examples of Jacobian descent with autogram, as users of TorchJD know them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Linear, MSELoss, ReLU, Sequential
from torch.optim import SGD

from jdcore.aggregation import Flattening, UPGrad, UPGradWeighting
from jdcore.autogram import Engine
from jdcore.autojac import backward, jac_to_grad


def test_instance_wise_risk_minimization() -> None:
    torch.manual_seed(0)
    model = Sequential(Linear(10, 5), ReLU(), Linear(5, 3), ReLU(), Linear(3, 1), ReLU())
    loss_fn = MSELoss(reduction="none")
    optimizer = SGD(model.parameters(), lr=0.1)
    weighting = UPGradWeighting()
    engine = Engine(model, batch_dim=0)
    inputs, targets = torch.randn(8, 16, 10), torch.randn(8, 16)
    before = [p.detach().clone() for p in model.parameters()]

    for input, target in zip(inputs, targets, strict=True):
        output = model(input).squeeze(dim=1)
        losses = loss_fn(output, target)
        gramian = engine.compute_gramian(losses)
        assert gramian.shape == (16, 16)
        weights = weighting(gramian)
        losses.backward(weights)
        optimizer.step()
        optimizer.zero_grad()

    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def _multi_task() -> tuple[nn.Module, nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    # float64: 32 objectives of rank 21 make the weights a matter of rounding in float32.
    shared = Sequential(Linear(10, 5), ReLU(), Linear(5, 3), ReLU()).double()
    first, second = Linear(3, 1).double(), Linear(3, 1).double()
    data = [torch.randn(*shape, dtype=torch.float64) for shape in ((16, 10), (16,), (16,))]
    return shared, first, second, data


def test_instance_wise_multi_task_learning() -> None:
    shared, first, second, (x, y1, y2) = _multi_task()
    mse = MSELoss(reduction="none")
    weighting = Flattening(UPGradWeighting())
    engine = Engine(shared, batch_dim=0)

    def losses_of() -> Tensor:
        features = shared(x)
        out1, out2 = first(features).squeeze(1), second(features).squeeze(1)
        return torch.stack([mse(out1, y1), mse(out2, y2)], dim=1)

    losses = losses_of()
    gramian = engine.compute_gramian(losses)
    assert gramian.shape == (16, 2, 2, 16)
    weights = weighting(gramian)
    assert weights.shape == (16, 2)
    losses.backward(weights)

    modules = nn.ModuleList([shared, first, second])
    two_passes = [p.grad.clone() for p in modules.parameters()]
    modules.zero_grad()
    torch.testing.assert_close(engine.backward(losses_of(), weighting), weights)
    for p, expected in zip(modules.parameters(), two_passes, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_multi_task_learning() -> None:
    shared, first, second, (x, y1, y2) = _multi_task()
    engine = Engine(shared, batch_dim=None)
    features = shared(x)
    losses = torch.stack(
        [MSELoss()(first(features)[:, 0], y1), MSELoss()(second(features)[:, 0], y2)]
    )
    weights = engine.backward(losses, UPGradWeighting())
    assert weights.shape == (2,)
    assert all(p.grad is not None for m in (shared, first, second) for p in m.parameters())


def test_partial_jacobian_descent() -> None:
    torch.manual_seed(0)
    model = Sequential(Linear(10, 8), ReLU(), Linear(8, 5), ReLU(), Linear(5, 1))
    engine = Engine(model[2], model[4], batch_dim=0)
    losses = model(torch.randn(16, 10)).squeeze(1).square()
    losses.backward(UPGradWeighting()(engine.compute_gramian(losses)))
    assert all(p.grad is not None for p in model.parameters())


def test_autogram_agrees_with_autojac() -> None:
    torch.manual_seed(0)
    model = Sequential(Linear(10, 5), ReLU(), Linear(5, 1)).double()
    x, y = torch.randn(8, 10).double(), torch.randn(8).double()

    def losses_of() -> Tensor:
        return (model(x).squeeze(1) - y).square()

    engine = Engine(model, batch_dim=0)
    engine.backward(losses_of(), UPGradWeighting())
    fused = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backward(losses_of())
    jac_to_grad(model.parameters(), UPGrad())
    for p, expected in zip(model.parameters(), fused, strict=True):
        torch.testing.assert_close(p.grad, expected)
