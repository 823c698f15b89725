"""A training that is interrupted continues bit for bit, the state of its method included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from jdcore.aggregation import GradVac, NashMTL, as_module
from jdcore.autojac import backward, jac_to_grad

STEPS = 6


def make_aggregation(method: str) -> nn.Module:
    if method == "nash_mtl":
        # Four is no divisor of half of the steps: the interruption comes between two solutions.
        return as_module(NashMTL(update_weights_every=4))
    return as_module(GradVac(generator=torch.Generator().manual_seed(0)))


class Training(nn.Module):
    """A model with two losses, and how to make one step."""

    def __init__(self, method: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.aggregation = make_aggregation(method)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)

    def step(self, batch: Tensor) -> None:
        self.optimizer.zero_grad()
        differentiate(self.model, self.aggregation, batch)
        self.optimizer.step()


def differentiate(model: nn.Module, aggregation: nn.Module, batch: Tensor) -> None:
    targets = torch.stack([batch.sum(dim=1), batch.prod(dim=1)], dim=1)
    losses = (model(batch) - targets).square().mean(dim=0)
    backward(losses)
    jac_to_grad(model.parameters(), aggregation.wrapped)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 4, generator=generator)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_state_matters_for_this_training() -> None:
    """Or else the tests below would pass without it."""
    whole, forgetful = Training("nash_mtl"), Training("nash_mtl")
    for index, batch in enumerate(batches()):
        whole.step(batch)
        if index == STEPS // 2:
            forgetful.aggregation.wrapped.reset()
        forgetful.step(batch)

    assert not torch.equal(parameters(whole), parameters(forgetful))


@pytest.mark.parametrize("method", ["nash_mtl", "gradvac"])
def test_a_training_restored_from_a_file_continues_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole, first = Training(method), Training(method)
    data = list(batches())
    for batch in data:
        whole.step(batch)
    for batch in data[: STEPS // 2]:
        first.step(batch)
    states = {"training": first.state_dict(), "optimizer": first.optimizer.state_dict()}
    if method == "gradvac":  # the generator is the caller's, and so is its state
        states["generator"] = first.aggregation.wrapped.weighting.generator.get_state()
    torch.save(states, tmp_path / "checkpoint.pt")

    restored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = Training(method)
    second.load_state_dict(restored["training"])
    second.optimizer.load_state_dict(restored["optimizer"])
    if method == "gradvac":
        second.aggregation.wrapped.weighting.generator.set_state(restored["generator"])
    for batch in data[STEPS // 2 :]:
        second.step(batch)

    assert torch.equal(parameters(whole), parameters(second))


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning", reason="needs lightning (tox -e full)")

    class Module(lightning.LightningModule):
        """The same training as a user of Lightning writes it."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False  # .grad comes from jac_to_grad
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
            self.aggregation = make_aggregation("nash_mtl")

        def training_step(self, batch: list[Tensor]) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            differentiate(self.model, self.aggregation, batch[0])
            optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameters(), lr=0.1)

    return Module()


def lightning_trainer(steps: int, folder: Path) -> Any:
    import lightning

    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


# Lightning warns of its own surroundings: the number of workers, deprecations in torch.
@pytest.mark.filterwarnings("default")
def test_a_lightning_training_restored_in_mid_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = (lightning_module() for _ in range(3))
    # One batch per epoch: Lightning resumes at the beginning of an epoch.
    loader = DataLoader(TensorDataset(next(batches())), batch_size=8)
    lightning_trainer(STEPS, tmp_path).fit(whole, loader)
    trainer = lightning_trainer(STEPS // 2, tmp_path)
    trainer.fit(first, loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    lightning_trainer(STEPS, tmp_path).fit(
        second, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )

    assert not torch.equal(parameters(whole.model), parameters(first.model))
    assert torch.equal(parameters(whole.model), parameters(second.model))
