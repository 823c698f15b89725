from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from jdcore._fields import free_jacs
from jdcore.distributed._sharding import Gathered
from jdcore.validators import tensor_list


def zero_jac(tensors: Tensor | Iterable[Tensor], /) -> None:
    """
    Remove the ``.jac`` of tensors, as ``optimizer.zero_grad()`` removes their ``.grad``.

    ``jac_to_grad`` removes what it has used. A step that ends before it (a batch that is skipped,
    an exception that is caught) leaves the ``.jac`` behind, to which the next ``backward`` adds.

    :param tensors: Usually the parameters of a model. Those without ``.jac`` are skipped.
    :raises ParameterTypeError: If something else than tensors is given.

    >>> import torch
    >>> from jdcore.autojac import backward, zero_jac
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), (w**2).sum()])
    >>> zero_jac(w)
    >>> hasattr(w, "jac")
    False
    """
    free_jacs(Gathered().shards(tensor_list(tensors, "tensors")))
