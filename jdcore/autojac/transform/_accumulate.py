from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from jdcore._fields import write_grads, write_jacs
from jdcore.autojac.transform._base import Transform, Values, describe_keys


class AccumulateJac(Transform):
    """
    Add Jacobians ``[m, *S]`` to the ``.jac`` of their keys; gives nothing.

    Nothing is written if any of the Jacobians does not fit the ``.jac`` that is already there. The
    values become the ``.jac``: they must not be used elsewhere.

    :param keys: Keys needed, usually parameters.
    """

    def __init__(self, keys: Iterable[Tensor]) -> None:
        super().__init__(needs=keys, gives=())

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        write_jacs(values)
        return {}

    def __repr__(self) -> str:
        return f"AccumulateJac({describe_keys(self.needs)})"


class AccumulateGrad(Transform):
    """
    Add gradients to the ``.grad`` of their keys, then run their post-accumulate-grad hooks.

    Nothing is written if any of the gradients does not fit the ``.grad`` that is already there. The
    values become the ``.grad``: they must not be used elsewhere. Gives nothing.

    :param keys: Keys needed, usually parameters.
    """

    def __init__(self, keys: Iterable[Tensor]) -> None:
        super().__init__(needs=keys, gives=())

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        write_grads(values)
        return {}

    def __repr__(self) -> str:
        return f"AccumulateGrad({describe_keys(self.needs)})"
