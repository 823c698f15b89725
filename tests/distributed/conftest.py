from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone: enough for what is refused."""
    if not dist.is_gloo_available():
        pytest.skip("needs the gloo backend")
    # A store in memory: a port may be taken by another run of the tests.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
