from __future__ import annotations

from typing import Any, Protocol
from weakref import ref

import attrs
import torch

from jdcore._by_class import ByClass
from jdcore.errors import ParameterError
from jdcore.validators import row_vector


class Placed(Protocol):
    """What lies on some device: a Tensor, or what stands for some."""

    @property
    def device(self) -> torch.device: ...


def check_row_vectors(method: Any, m: int, given: Placed) -> None:
    """
    Refuse an argument with one entry per objective that does not fit the input of a call.

    The arguments are the attrs fields of the method whose validator is
    :func:`jdcore.validators.row_vector`.

    :param m: Number of objectives of the input.
    :param given: The input, which is asked for its device where there are such arguments.
    :raises ParameterError: If the length or the device differs.
    """
    for name in row_vector_fields[ref(type(method))]:
        vector = getattr(method, name)
        if vector is None:
            continue
        if vector.shape[0] != m:
            raise ParameterError(
                name, f"of length {m}, the number of objectives", f"length {len(vector)}"
            )
        device = given.device
        if vector.device != device:
            raise ParameterError(
                name,
                f"on {device}, the device of the input",
                f"a Tensor on {vector.device}",
                f"Move it: {name}.to({str(device)!r}).",
            )


@ByClass
def row_vector_fields(cls: Any) -> tuple[str, ...]:
    """The fields that :func:`check_row_vectors` looks at."""
    # By the validator, so that a field of any name, of a class of anybody, is found without a list.
    return tuple(f.name for f in attrs.fields(cls) if f.validator is row_vector)
