"""The example of docs/distributed.md, run as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
def test_the_example_of_the_documentation_runs() -> None:
    [example] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    scope: dict[str, object] = {"__name__": "example"}
    exec(compile(example, PAGE.name, "exec"), scope)
    assert all(p.grad is not None for p in scope["model"].parameters())
