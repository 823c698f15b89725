"""Rows that depend on each other in every way that is known to be hard for a solver."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Draw = Callable[[int, np.random.Generator], np.ndarray]


def _low(rank: int) -> Draw:
    return lambda m, random: random.standard_normal((m, max(1, m // rank)))


def _twins(sign: float, columns: int) -> Draw:
    """One half repeats the other, or is opposite to it, up to 1e-4."""

    def draw(m: int, random: np.random.Generator) -> np.ndarray:
        half = random.standard_normal((m // 2, columns * m))
        return np.concatenate([half, sign * half + 1e-4 * random.standard_normal(half.shape)])

    return draw


def _opposites(m: int, random: np.random.Generator) -> np.ndarray:
    half = random.standard_normal((m // 2, 2 * m))
    return np.concatenate([half, -2.0 * half])


def _clusters(m: int, random: np.random.Generator) -> np.ndarray:
    """Groups of eight rows that are nearly equal or opposite."""
    centres = np.repeat(random.standard_normal((m // 8, 2 * m)), 8, axis=0)
    centres *= random.choice([-1.0, 1.0], (len(centres), 1))
    return centres + 1e-4 * random.standard_normal(centres.shape)


def _weakly_stationary(m: int, random: np.random.Generator) -> np.ndarray:
    """Some rows cancel, and the others agree along one direction that is orthogonal to these."""
    n, cancelling = m // 2, int(0.6 * m)
    direction = random.standard_normal(n)
    direction /= np.linalg.norm(direction)
    rows = random.standard_normal((m, n))
    rows -= np.outer(rows @ direction, direction)
    mixture = np.abs(random.standard_normal((cancelling - 1, 1))) + 0.1
    rows[cancelling - 1] = -(mixture * rows[: cancelling - 1]).sum(axis=0)
    rows[cancelling:] += np.abs(random.standard_normal((m - cancelling, 1))) * direction
    return rows


def _blocks(m: int, random: np.random.Generator) -> np.ndarray:
    """Four groups of rows, each in a space of its own, of half as many dimensions as rows."""
    rows, size = np.zeros((m, m // 2)), m // 4
    for i in range(4):
        block = rows[i * size : (i + 1) * size, i * (m // 8) : (i + 1) * (m // 8)]
        block[:] = random.standard_normal(block.shape)
    return rows[: 4 * size]


def _columns(exponents: Callable[[int, np.random.Generator], np.ndarray]) -> Draw:
    """Columns of all scales: rows agree on some, and less and less on the others."""
    return lambda m, random: random.standard_normal((m, 2 * m)) * 10.0 ** exponents(m, random)


def _noise(scale: float) -> Draw:
    """Multiples of one row, and noise."""

    def draw(m: int, random: np.random.Generator) -> np.ndarray:
        row = np.outer(random.standard_normal(m), random.standard_normal(2 * m))
        return row + scale * random.standard_normal(row.shape)

    return draw


def _narrow(least: float, scale: float) -> Draw:
    """Few columns, the first of which is positive: all rows leave a cone, thin or thick."""

    def draw(m: int, random: np.random.Generator) -> np.ndarray:
        rows = random.standard_normal((m, max(2, m // 8)))
        rows[:, 0] = least + scale * np.abs(rows[:, 0])
        return rows

    return draw


def _huge(m: int, random: np.random.Generator) -> np.ndarray:
    rows = random.standard_normal((m, m // 2))
    rows[0] *= 1e6
    return rows


def _outer_products(m: int, random: np.random.Generator) -> np.ndarray:
    """Gradients of a layer with softmax: of few classes, times of few features."""
    errors = np.exp(2.0 * random.standard_normal((m, 10)))
    errors /= errors.sum(axis=1, keepdims=True)
    errors[np.arange(m), random.integers(0, 10, m)] -= 1.0
    features = np.maximum(random.standard_normal((m, 12)), 0.0)
    features[:, 0] = 1.0
    return np.einsum("ij,ik->ijk", errors, features).reshape(m, -1)


def _permutations(m: int, random: np.random.Generator) -> np.ndarray:
    base = random.standard_normal(max(2, m // 4))
    return np.stack([random.permutation(base) for _ in range(m)])


def _fan(m: int, random: np.random.Generator) -> np.ndarray:
    angles = np.linspace(0.0, 0.9 * np.pi, m)
    return np.stack([np.cos(angles), np.sin(angles), 0.1 * random.standard_normal(m)], axis=1)


KINDS: dict[str, Draw] = {
    "independent": lambda m, random: random.standard_normal((m, 2 * m)),
    "half rank": _low(2),
    "low rank": _low(8),
    "nearly equal": _twins(1.0, 2),
    "nearly opposite": _twins(-1.0, 2),
    "opposite": _opposites,
    "clusters": _clusters,
    "weakly stationary": _weakly_stationary,
    "blocks": _blocks,
    "columns of all scales": _columns(lambda m, random: random.uniform(-6.0, 6.0, (1, 2 * m))),
    "graded columns": _columns(lambda m, random: np.linspace(-6.0, 6.0, 2 * m)),
    "decaying columns": _columns(lambda m, random: -8.0 * np.arange(2 * m) / m),
    "one row and noise": _noise(1e-3),
    "one row and less noise": _noise(1e-6),
    "thin cone": _narrow(0.0, 0.5),
    "thick cone": _narrow(1.0, 4.0),
    "one huge row": _huge,
    "outer products": _outer_products,
    "integers": lambda m, random: random.integers(-1, 2, (m, m // 4)).astype(np.float64),
    "many integers": lambda m, random: random.integers(-1, 2, (m, 2 * m)).astype(np.float64),
    "one row": lambda m, random: np.repeat(random.standard_normal((1, 50)), m, axis=0),
    "one row and its opposite": lambda m, random: np.outer(
        random.choice([-1.0, 1.0], m), random.standard_normal(50)
    ),
    "permutations": _permutations,
    "fan": _fan,
    "sum of zero": lambda m, random: np.subtract(
        rows := random.standard_normal((m, 2 * m)), rows.mean(axis=0)
    ),
    "products of factors": lambda m, random: np.kron(
        random.standard_normal((m // 8, 6)), random.standard_normal((8, 4))
    ),
}
"""By name, what draws m rows, where m is a multiple of eight."""
