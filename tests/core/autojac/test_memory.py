"""No call holds more at once than the Jacobian that it makes, and little beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jdcore.aggregation import GramianAggregator
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward
from tests.memory import peak_bytes

M = 6


def _mean(gramian: Tensor) -> Tensor:
    return torch.full((len(gramian),), 1.0 / len(gramian), dtype=gramian.dtype)


class _Setting:
    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(400, 400), nn.ReLU())]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(400, 1) for _ in range(M))
        self.shared = list(self.trunk.parameters())
        self.x = torch.randn(2, 400)
        self.jacobian = M * 4 * sum(parameter.numel() for parameter in self.shared)

    def forward(self) -> tuple[list[Tensor], Tensor]:
        features = self.trunk(self.x)
        return [head(features).square().mean() for head in self.heads], features

    def plain(self) -> None:
        torch.stack(self.forward()[0]).mean().backward()
        self.clear()

    def clear(self) -> None:
        for parameter in [*self.shared, *self.heads.parameters()]:
            parameter.grad = None


@pytest.fixture
def setting() -> _Setting:
    setting = _Setting()
    setting.plain()  # what is allocated once and for all
    return setting


@pytest.mark.parametrize("chunk_size", [1, M])
def test_backward_and_jac_to_grad_take_a_jacobian_above_plain_backward(
    setting: _Setting, chunk_size: int
) -> None:
    def step() -> None:
        backward(setting.forward()[0], inputs=setting.shared, parallel_chunk_size=chunk_size)
        jac_to_grad(setting.shared, GramianAggregator(_mean))
        setting.clear()

    step()
    assert peak_bytes(step) - peak_bytes(setting.plain) <= 1.1 * setting.jacobian


def test_no_row_exists_as_a_whole_beside_the_jacobian(setting: _Setting) -> None:
    def step() -> None:
        backward(setting.forward()[0], inputs=setting.shared, parallel_chunk_size=1)
        for parameter in setting.shared:
            del parameter.jac

    step()
    row = setting.jacobian // M
    largest = 4 * 400 * 400
    # Plain backward holds a whole gradient; the rows are taken one parameter at a time.
    assert peak_bytes(step) - peak_bytes(setting.plain) <= setting.jacobian - row + 2 * largest


def test_mtl_backward_and_jac_to_grad_take_a_jacobian_above_plain_backward(
    setting: _Setting,
) -> None:
    def step() -> None:
        mtl_backward(*setting.forward())
        jac_to_grad(setting.shared, GramianAggregator(_mean))
        setting.clear()

    step()
    assert peak_bytes(step) - peak_bytes(setting.plain) <= 1.1 * setting.jacobian


def test_the_lean_step_takes_the_rows_of_the_largest_parameter_above_plain_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jdcore.graph._memory._ROWS", 1)  # no rows are few enough to be kept
    # Elementwise products with a parameter, so that there are rows to be held.
    scales = [nn.Parameter(torch.randn(400, 400)) for _ in range(6)]
    y = torch.randn(400, 400)

    def forward() -> list[Tensor]:
        z = y
        for scale in scales:
            z = (z * scale).tanh()
        return [z[k].square().mean() for k in range(M)]

    def plain() -> None:
        torch.stack(forward()).mean().backward()
        clear()

    def step() -> None:
        gramian_backward(forward(), _mean)
        clear()

    def clear() -> None:
        for scale in scales:
            scale.grad = None

    plain()
    step()
    largest = M * 4 * 400 * 400
    # What flows backwards is as large as the rows here, and one more of them is in the making. The
    # Gramian is made of float64 pieces of 2 ** 17 entries.
    assert peak_bytes(step) - peak_bytes(plain) <= 3.1 * largest + 8 * 2**17
    assert 3.1 * largest + 8 * 2**17 < M * largest


def test_the_lean_step_takes_no_rows_of_linear_layers(
    setting: _Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jdcore.graph._memory._ROWS", 1)

    def step() -> None:
        gramian_backward(setting.forward()[0], _mean, inputs=setting.shared)
        setting.clear()

    step()
    # What is above plain backward is a bias, and the gradients [6, 2, 400] at the layers.
    assert peak_bytes(step) - peak_bytes(setting.plain) <= 0.05 * setting.jacobian
