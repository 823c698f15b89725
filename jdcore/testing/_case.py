from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from jdcore._discovery import AGGREGATOR
from jdcore._methods import aggregator_class, weighting_class
from jdcore._registry import registry
from jdcore.aggregation._informed import example_inputs
from jdcore.errors import ParameterError, UnsolvedWarning
from jdcore.spec import AggregatorSpec, Property
from jdcore.testing.families import FAMILIES, family
from jdcore.validators import describe_tensor

_SIZES = (2, 3, 5, 8)
_COLUMNS = 40


class ConformanceError(AssertionError):
    """A method breaks a law of the contract, or a property its spec declares."""


class NotApplicable(Exception):  # noqa: N818 - nothing is wrong
    """A check has nothing to look at on this machine."""


@frozen
class Case:
    """One method under test: makes fresh instances and matrices to call them on."""

    name: str

    @property
    def spec(self) -> AggregatorSpec:
        spec: AggregatorSpec = registry.entry(AGGREGATOR, self.name).spec
        return spec

    @property
    def rows(self) -> int:
        """A number of rows the method is defined for, with its example arguments."""
        return max(4, self.spec.min_rows)

    def make(self, m: int, arguments: Mapping[str, Any] | None = None, seed: int = 0) -> Any:
        """A new aggregator for m rows, seeded if the method is stochastic."""
        return self._construct(aggregator_class(self.name), m, arguments or {}, seed)

    def make_weighting(
        self, m: int, arguments: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Any:
        """A new weighting for m rows, seeded if the method is stochastic."""
        return self._construct(weighting_class(self.name), m, arguments or {}, seed)

    def _construct(self, cls: type, m: int, arguments: Mapping[str, Any], seed: int) -> Any:
        # A generator of its own, so that checks do not depend on which of them ran before.
        seeded = {"generator": torch.Generator().manual_seed(seed)} if self.spec.stochastic else {}
        return cls(**{**self.spec.example(m), **seeded, **arguments})

    def inputs(self, matrix: Any) -> dict[str, Any]:
        """What a call of the aggregator needs beside the matrix; nothing for what is no matrix."""
        usable = isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.is_floating_point()
        return example_inputs(self.spec, matrix.detach()) if usable else {}

    def call(self, aggregator: Any, matrix: Tensor) -> Tensor:
        """Call an aggregator, with all that it needs."""
        return quietly(lambda: aggregator(matrix, **self.inputs(matrix)))

    def weigh(self, weighting: Any, matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Call a weighting on the Gramian (or cross-Gramian) of a matrix, with all it needs."""
        # A method of two batches takes the products of the rows with those of the second one.
        inputs = self.inputs(matrix)
        gramian = matrix @ inputs.pop("second", matrix).T
        return quietly(lambda: weighting(gramian.to(dtype or matrix.dtype), **inputs))

    def declares(self, prop: Property) -> bool:
        return prop in self.spec.properties

    def matrices(self, *families: str) -> Iterator[tuple[str, Tensor]]:
        """Matrices of all (or the given) families in several sizes, float64, with their labels."""
        for name in families or FAMILIES:
            for m in _SIZES:
                if m >= self.spec.min_rows:
                    generator = torch.Generator().manual_seed(m)
                    yield f"{name} {m}x{_COLUMNS}", family(name, m, _COLUMNS, generator=generator)

    def gauss(self, m: int | None = None, n: int = _COLUMNS, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(
            self.rows if m is None else m, n, generator=generator, device="cpu"
        ).double()


def accelerator() -> str:
    """
    The kind of accelerator that this machine has.

    :raises NotApplicable: If it has none, or one without float64, in which Gramians are summed.
    """
    # Of several kinds, torch names the one that programs use unless told otherwise.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type == "mps":
        raise NotApplicable("this machine has no accelerator with float64")
    return found.type


def quietly(call: Callable[[], Tensor]) -> Tensor:
    """
    Call a method; being told that a problem is ill-posed is no failure of the method.

    :raises ConformanceError: If it returns no Tensor.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)
        result: object = call()
    if isinstance(result, Tensor):
        return result
    raise ConformanceError(f"it returns {describe_tensor(result)}, no Tensor")


def demand(condition: bool, message: str) -> None:
    """
    State a law.

    :raises ConformanceError: If the condition does not hold.
    """
    if not condition:
        raise ConformanceError(message)


def demand_refusal(action: Callable[[], Any], label: str) -> ParameterError:
    """
    Demand that bad input is refused.

    :returns: The error.
    :raises ConformanceError: If there is none.
    """
    try:
        action()
    except ParameterError as error:
        return error
    raise ConformanceError(f"{label} should raise a ParameterError")


def demand_close(actual: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    """
    Demand that two tensors agree up to a tolerance relative to the largest expected entry.

    :raises ConformanceError: If they do not, with the error found.
    """
    demand(actual.shape == expected.shape, f"{message}: shapes {actual.shape}, {expected.shape}")
    if not expected.numel():
        return
    scale = float(expected.abs().max())
    error = float((actual.double() - expected.double()).abs().max())
    demand(error <= tolerance * scale, f"{message}: error {error:.1e} at scale {scale:.1e}")
