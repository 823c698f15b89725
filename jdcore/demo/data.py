"""
The data: pairs of handwritten digits laid over each other, as in MultiMNIST.

The digits are the 1797 scans of 8 x 8 pixels that ship with scikit-learn, so nothing is downloaded.
The construction follows `Dynamic Routing Between Capsules <https://arxiv.org/abs/1710.09829>`_,
section 6.1, and `Multi-Task Learning as Multi-Objective Optimization
<https://arxiv.org/abs/1810.04650>`_: the left digit goes to the upper left corner, the right one to
the lower right, and the tasks are to read the one and the other.
"""

from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor

HEIGHT, WIDTH = 10, 12
TEST_SOURCES, TRAIN_PAIRS, TEST_PAIRS = 500, 8000, 2000

_SIDE = 8


@frozen(eq=False)
class OverlaidDigits:
    """
    Images [k, HEIGHT, WIDTH] with values in [0, 1], and labels [k, 2] (left digit, right digit).

    No scan is seen in both training and test.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def overlaid_digits(seed: int) -> OverlaidDigits:
    """Draw the split into training and test scans, and then the pairs."""
    digits = load_digits()
    scans, labels = digits.images.astype(np.float32) / digits.images.max(), digits.target
    generator = np.random.default_rng(seed)
    train_pairs, test_pairs = draw_pairs(len(scans), generator)
    return OverlaidDigits(
        torch.from_numpy(overlay(scans, train_pairs)),
        torch.from_numpy(labels[train_pairs]),
        torch.from_numpy(overlay(scans, test_pairs)),
        torch.from_numpy(labels[test_pairs]),
    )


def draw_pairs(
    scans: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices [k, 2] of the scans paired for training and for testing, which share none."""
    order = generator.permutation(scans)
    train, test = order[TEST_SOURCES:], order[:TEST_SOURCES]
    return generator.choice(train, (TRAIN_PAIRS, 2)), generator.choice(test, (TEST_PAIRS, 2))


def overlay(scans: NDArray[np.float32], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """
    Lay two scans over each other; where they meet, the stronger ink shows.

    :param scans: Scans [count, 8, 8].
    :param pairs: Indices [k, 2] of the left and the right scan.
    :returns: Images [k, HEIGHT, WIDTH].
    """
    left, right = np.zeros((2, len(pairs), HEIGHT, WIDTH), dtype=np.float32)
    left[:, :_SIDE, :_SIDE] = scans[pairs[:, 0]]
    right[:, -_SIDE:, -_SIDE:] = scans[pairs[:, 1]]
    return np.maximum(left, right)
