"""Patches of convolutions: Gram matrices by shifts of those of pixels, in both policies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jdcore.graph._memory import Memory
from jdcore.graph.shares import Geometry
from jdcore.graph.shares._patches import patch_gram, patches

POLICIES = {
    "caches": Memory(1 << 20, 1 << 20, 1 << 20, cached=True),
    "few operations": Memory(1 << 24, 1 << 24, 1 << 24, cached=False),
    "few operations, little memory": Memory(1, 1, 1, cached=False),
}

PAIRS = st.tuples(st.integers(1, 2), st.integers(1, 2))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=PAIRS,
    dilation=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    r=st.integers(1, 2),
)
def test_the_gram_matrix_of_patches_is_that_of_their_products(
    policy: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    r: int,
) -> None:
    B, C = 3, 2
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(B * r, C, 5, 6, dtype=torch.float64, generator=generator)
    geometry = Geometry(stride, padding, dilation, False, (0, 0), 1)
    found = patches(images, geometry, kernel, B)
    # The order of channels and pixels of a patch differs, which products do not show.
    unfolded = torch.nn.functional.unfold(images, kernel, dilation, padding, stride)
    rows = unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
    flat = found.reshape(len(rows), -1)
    assert torch.allclose(flat.sort(1).values, rows.sort(1).values, rtol=0, atol=0)
    gram = patch_gram(images, geometry, kernel, found.shape[2:4], r, POLICIES[policy])
    T = len(rows) // B
    for start, stop in ((0, B), (1, 2)):
        expected = rows[start * T : stop * T] @ rows[: stop * T].T
        assert torch.allclose(gram(start, stop), expected, rtol=0, atol=1e-12)
