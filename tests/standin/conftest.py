from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler, load

NAME = "standin"
SOURCE = Path(__file__).with_name("device.cpp")


class _Module(ModuleType):
    """``torch.standin``: what torch and its users ask of the module of a device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass  # its random numbers are those of the CPU

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Other tests must not find an accelerator: these are left out where they are not alone."""
    folder = Path(__file__).parent
    others = [item for item in items if folder not in item.path.parents]
    if others:
        config.hook.pytest_deselected(items=[item for item in items if item not in others])
        items[:] = others


@pytest.fixture(scope="session")
def standin(one_thread: None) -> Any:
    """The extension, whose device has the name ``standin`` from now on."""
    if shutil.which(get_cxx_compiler()) is None or shutil.which("ninja") is None:
        pytest.skip("needs a C++ compiler and ninja")
    # Threads of a device that torch ends with the process ask for a lock that is gone by then.
    os.environ["TORCH_AUTOGRAD_SHUTDOWN_WAIT_TIMEOUT"] = "0"
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(f"torch.{NAME}"))
    torch.utils.generate_methods_for_privateuse1_backend()
    load("jdcore_standin", [str(SOURCE)], extra_cflags=["-O0"], is_python_module=False)
    return torch.ops.standin


@pytest.fixture(autouse=True)
def _on_the_device(standin: Any) -> Iterator[None]:
    """Models make index tensors and masks without a device."""
    with torch.device(NAME):
        yield
