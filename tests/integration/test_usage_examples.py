"""The usage examples that users of TorchJD know, with nothing changed but the imports."""

from __future__ import annotations

import torch
from torch.nn import Linear, MSELoss, ReLU, Sequential
from torch.optim import SGD

from jdcore.aggregation import UPGrad
from jdcore.autojac import backward, jac, jac_to_grad, mtl_backward


def test_backward_and_jac_to_grad() -> None:
    torch.manual_seed(0)
    model = Sequential(Linear(10, 5), ReLU(), Linear(5, 2))
    loss_fn = MSELoss()
    optimizer = SGD(model.parameters(), lr=0.1)
    aggregator = UPGrad()

    input = torch.randn(16, 10)
    target1, target2 = torch.randn(16), torch.randn(16)

    history = []
    for _ in range(20):
        output = model(input)
        loss1 = loss_fn(output[:, 0], target1)
        loss2 = loss_fn(output[:, 1], target2)
        backward([loss1, loss2])
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss1.item(), loss2.item()))

    assert history[-1][0] < history[0][0]
    assert history[-1][1] < history[0][1]


def test_mtl_backward_and_jac_to_grad() -> None:
    torch.manual_seed(0)
    shared_module = Sequential(Linear(10, 5), ReLU(), Linear(5, 3), ReLU())
    task1_module = Linear(3, 1)
    task2_module = Linear(3, 1)
    params = [
        *shared_module.parameters(),
        *task1_module.parameters(),
        *task2_module.parameters(),
    ]
    before = [p.detach().clone() for p in params]

    loss_fn = MSELoss()
    optimizer = SGD(params, lr=0.1)
    aggregator = UPGrad()

    inputs = torch.randn(8, 16, 10)
    task1_targets = torch.randn(8, 16, 1)
    task2_targets = torch.randn(8, 16, 1)

    for input, target1, target2 in zip(inputs, task1_targets, task2_targets, strict=True):
        features = shared_module(input)
        output1 = task1_module(features)
        output2 = task2_module(features)
        loss1 = loss_fn(output1, target1)
        loss2 = loss_fn(output2, target2)

        mtl_backward([loss1, loss2], features=features)
        weights = jac_to_grad(shared_module.parameters(), aggregator)
        assert weights.shape == (2,)
        optimizer.step()
        optimizer.zero_grad()

    for parameter, old in zip(params, before, strict=True):
        assert not torch.equal(parameter, old)
        assert not hasattr(parameter, "jac")


def test_jac_composes_like_autograd_grad() -> None:
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    y1 = torch.tensor([-1.0, 1.0]) @ param
    y2 = (param**2).sum()
    y3 = (param**3).sum()
    jacobians = jac([y1, y2, y3], [param])
    assert len(jacobians) == 1
    assert jacobians[0].tolist() == [[-1.0, 1.0], [2.0, 4.0], [3.0, 12.0]]
