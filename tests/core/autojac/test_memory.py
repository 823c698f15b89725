"""No call holds more at once than the Jacobian that it makes, and little beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jdcore.aggregation import GramianAggregator
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward
from jdcore.autojac._vmap import bytes_of_row
from jdcore.graph import reach
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


def _convolutions() -> nn.Module:
    def layer(channels: int, groups: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, 16, 3, padding=1, groups=groups)
        return [convolution, nn.BatchNorm2d(16), nn.ReLU()]

    layers = [*layer(3, 1), *layer(16, 4), *layer(16, 1)]
    return nn.Sequential(nn.Unflatten(1, (3, 16, 16)), *layers, nn.AdaptiveAvgPool2d(1))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(len(x), -1, 32)).view(len(x), 3, 4, -1, 8).unbind(1)
        return ((q @ k.mT).softmax(-1) @ v).tanh()


ROWS = {
    "convolutions": (_convolutions, lambda: torch.randn(8, 768)),
    "attention": (_Attention, lambda: torch.randn(4, 2048)),
    "a table": (lambda: nn.Embedding(3000, 16), lambda: torch.randint(3000, (8, 16))),
    "layers": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), lambda: torch.randn(512, 64)),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_at_once_take_no_more_than_is_counted_for_them(name: str) -> None:
    make, inputs = ROWS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()
    parameters = list(model.parameters())

    def losses() -> list[Tensor]:
        features = model(x).flatten(1)
        return [features[:, k::M].square().mean() for k in range(M)]

    def rows(of: list[Tensor]) -> None:
        backward(of, inputs=parameters, parallel_chunk_size=M, retain_graph=True)

    rows(losses())  # what is tried once
    for parameter in parameters:
        del parameter.jac
    found = losses()
    jacobian = M * 4 * sum(parameter.numel() for parameter in parameters)
    counted = M * bytes_of_row(parameters, reach(found))
    assert peak_bytes(lambda: rows(found)) <= jacobian + counted
