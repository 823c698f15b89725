"""The training loop, and what it observes of the two task gradients at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR

from jdcore.autojac import jac_to_grad, mtl_backward
from jdcore.demo.data import OverlaidDigits
from jdcore.demo.model import TwoDigitReader
from jdcore.linalg import gramian
from jdcore.protocols import Aggregator

BATCH_SIZE = 16

_LEARNING_RATE = 0.2
# A negative cosine between an update and a gradient counts as a conflict beyond this: updates that
# are orthogonal to a gradient by construction come out of float32 arithmetic near -1e-7.
_ROUNDING = 1e-5


@frozen(eq=False)
class Step:
    """
    What one step showed: both losses, the cosine between the gradients of the two tasks with
    respect to the shared parameters (NaN if one vanishes), and whether the update had a negative
    inner product with one of them. A step that is not finite was not taken.
    """

    losses: tuple[float, float]
    cosine: float
    conflict: bool
    finite: bool


@frozen(eq=False)
class Run:
    """One training: its steps in order, and the test accuracies of both tasks."""

    method: str
    steps: tuple[Step, ...]
    accuracies: tuple[float, float]

    @property
    def diverged(self) -> bool:
        """Whether the training ended early, at an update that was not finite."""
        return not self.steps[-1].finite

    @property
    def conflict_share(self) -> float:
        """Share of the steps whose update conflicted with a task."""
        return sum(step.conflict for step in self.steps) / len(self.steps)

    def final_loss(self, task: int) -> float:
        """Training loss of a task, averaged over the last tenth of the steps."""
        last = self.steps[-max(1, len(self.steps) // 10) :]
        return sum(step.losses[task] for step in last) / len(last)


def steps_per_epoch(digits: OverlaidDigits) -> int:
    """Number of batches; the pairs that fill no batch wait for the next shuffle."""
    return len(digits.train_images) // BATCH_SIZE


def train(
    method: str,
    aggregator: Aggregator,
    digits: OverlaidDigits,
    *,
    epochs: int,
    seed: int,
    advance: Callable[[], None],
) -> Run:
    """
    Train a new model. The same seed gives the same first weights and batches for every method.

    :param method: Name of the method, for the report.
    :param aggregator: Makes one update of the gradients of both tasks.
    :param advance: Called after every step.
    """
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = TwoDigitReader()
        shuffling = torch.Generator().manual_seed(seed)  # not shared with stochastic methods
        steps = []
        for step in _steps(model, aggregator, digits, epochs, shuffling):
            steps.append(step)
            advance()
    return Run(method, tuple(steps), _accuracies(model, digits))


@contextmanager
def one_thread() -> Iterator[None]:
    """
    Compute with one thread.

    Batches this small lose more to waking threads than they gain, up to tenfold on a busy machine;
    and results do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _steps(
    model: TwoDigitReader,
    aggregator: Aggregator,
    digits: OverlaidDigits,
    epochs: int,
    shuffling: torch.Generator,
) -> Iterator[Step]:
    # Plain SGD: with momentum or Adam the parameters would not move along the aggregated update.
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
    total = epochs * steps_per_epoch(digits)
    schedule = LinearLR(optimizer, start_factor=1.0, end_factor=0.01, total_iters=total)
    for batch in _batches(digits, epochs, shuffling):
        optimizer.zero_grad()
        images, labels = digits.train_images[batch], digits.train_labels[batch]
        step = _differentiate(model, aggregator, images, labels)
        # The parameters of a training that diverges stay as they were, so that it can be looked at.
        if step.finite:
            optimizer.step()
            schedule.step()
        yield step
        if not step.finite:
            return


def _batches(digits: OverlaidDigits, epochs: int, shuffling: torch.Generator) -> Iterator[Tensor]:
    count = len(digits.train_images)
    for _ in range(epochs):
        order = torch.randperm(count, generator=shuffling)
        yield from order[: count - count % BATCH_SIZE].view(-1, BATCH_SIZE)


def _differentiate(
    model: TwoDigitReader, aggregator: Aggregator, images: Tensor, labels: Tensor
) -> Step:
    """Leave the update of the shared parameters and the gradients of the heads in ``.grad``."""
    shared = list(model.trunk.parameters())
    features = model.trunk(images)
    losses = [
        cross_entropy(head(features), labels[:, task]) for task, head in enumerate(model.heads)
    ]
    left, right = losses
    mtl_backward(losses, features)
    # Before `jac_to_grad`, which takes them away.
    rows = [p.jac.flatten(1) for p in shared]  # type: ignore[attr-defined]  # set by autojac
    jac_to_grad(shared, aggregator, losses=losses)
    update = torch.cat([p.grad.flatten() for p in shared if p.grad is not None])
    return Step(
        (left.item(), right.item()),
        *compare_gradients(torch.cat(rows, dim=1), update),
        finite=bool(torch.isfinite(update).all()),
    )


def compare_gradients(jacobian: Tensor, update: Tensor) -> tuple[float, bool]:
    """The cosine between the two rows, and whether the update conflicts with one of them."""
    product = gramian(jacobian)
    norms = product.diagonal().sqrt()
    inner = jacobian.double() @ update.double()
    conflict = inner < -_ROUNDING * norms * update.double().norm()
    return (product[0, 1] / norms.prod()).item(), bool(conflict.any())


@torch.no_grad()
def _accuracies(model: TwoDigitReader, digits: OverlaidDigits) -> tuple[float, float]:
    read = model(digits.test_images).argmax(dim=2)
    left, right = (read == digits.test_labels).double().mean(dim=0).tolist()
    return left, right
