from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import chain, pairwise
from operator import is_

from torch import Tensor

from jdcore.errors import TransformError

Values = Mapping[Tensor, Tensor]


class Transform(ABC):
    """
    A step of a differentiation: maps tensors to tensors, each filed under the tensor it belongs to.

    The values that flow between transforms are mappings whose keys are tensors of the user's graph
    (losses, features, parameters) and whose values are what is known about them (a gradient, a
    Jacobian). Which keys a transform needs and gives is fixed when it is made, so a graph that does
    not fit together fails when it is built, before anything is computed.

    Compose with ``first >> second`` (keys that ``second`` does not need are dropped) and
    ``one | other`` (both read the same values; their results are united). To write your own, pass
    the keys to this constructor and implement :meth:`apply`:

    >>> import torch
    >>> from jdcore.autojac.transform import Diagonalize, Init, Jac, Transform
    >>> class NormalizeRows(Transform):
    ...     def __init__(self, keys):
    ...         super().__init__(needs=keys, gives=keys)
    ...
    ...     def apply(self, values):
    ...         return {k: v / v.norm(dim=1, keepdim=True) for k, v in values.items()}
    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> loss = (w**2).sum()
    >>> graph = Init([loss]) >> Diagonalize([loss]) >> Jac([loss], [w]) >> NormalizeRows([w])
    >>> graph()[w]
    tensor([[0.6000, 0.8000]])

    :param needs: Keys that must be among the values given to the transform.
    :param gives: Keys of the values that it returns.
    """

    def __init__(self, needs: Iterable[Tensor], gives: Iterable[Tensor]) -> None:
        self.needs, self.gives = _distinct(needs), _distinct(gives)

    @abstractmethod
    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        """
        :param values: One value for each key in ``needs``, and no other.
        :returns: One value for each key in ``gives``.
        """

    def __call__(self, values: Values | None = None, /) -> Values:
        """
        Run the transform.

        :param values: Values for at least the keys in ``needs``; may be left out if there are none.
        :returns: Values for the keys in ``gives``.
        :raises TransformError: If keys are missing.
        """
        given = {} if values is None else values
        # In a chain, these are most often the very keys: the hash of a tensor is a function of
        # Python, and to copy a dictionary asks for none.
        if len(given) == len(self.needs) and all(map(is_, given, self.needs)):
            return self.apply(dict(given))
        # Missing keys are looked for only where one is missing: a set of all keys for each
        # transform would cost more than most of them do.
        try:
            needed = {key: given[key] for key in self.needs}
        except KeyError:
            check_covered(self, given)  # names all that are missing
            raise
        return self.apply(needed)

    def __rshift__(self, second: Transform) -> Transform:
        """Run this transform, then ``second`` on its result."""
        return Chain([*_parts(self, Chain), *_parts(second, Chain)])

    def __or__(self, other: Transform) -> Transform:
        """Run this transform and ``other`` on the same values and unite their results."""
        return Union([*_parts(self, Union), *_parts(other, Union)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_keys(self.needs)} -> {describe_keys(self.gives)})"


class Chain(Transform):
    """
    Transforms run one after another, as ``first >> second``.

    :param parts: The transforms, in the order in which they run.
    :raises TransformError: If a part needs keys that the one before it does not give.
    """

    def __init__(self, parts: Iterable[Transform]) -> None:
        self.parts = tuple(parts)
        for before, after in pairwise(self.parts):
            check_covered(after, before.gives, before)
        # Distinct already, as those of its parts are: to make sure would hash every key again.
        self.needs, self.gives = self.parts[0].needs, self.parts[-1].gives

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        result: Values = values
        for part in self.parts:
            result = part(result)
        return result

    def __repr__(self) -> str:
        texts = [f"({part!r})" if isinstance(part, Union) else repr(part) for part in self.parts]
        return "\n>> ".join(texts)


class Union(Transform):
    """
    Transforms that read the same values and give different keys, as ``one | other``.

    :param parts: The transforms. They run in this order.
    :raises TransformError: If two parts give the same key.
    """

    def __init__(self, parts: Iterable[Transform]) -> None:
        self.parts = tuple(parts)
        given: dict[int, Transform] = {}
        for part in self.parts:
            doubled = [key for key in part.gives if id(key) in given]
            if doubled:
                raise TransformError(
                    f"{given[id(doubled[0])]!r} and {part!r} cannot be united: both give "
                    f"{describe_keys(doubled, limit=None)}."
                )
            given.update([(id(key), part) for key in part.gives])
        needs, gives = ([part.needs for part in self.parts], [part.gives for part in self.parts])
        super().__init__(chain.from_iterable(needs), chain.from_iterable(gives))

    def apply(self, values: dict[Tensor, Tensor], /) -> Values:
        return {key: value for part in self.parts for key, value in part(values).items()}

    def __repr__(self) -> str:
        return " | ".join(f"({p!r})" if isinstance(p, Chain) else repr(p) for p in self.parts)


def _distinct(keys: Iterable[Tensor]) -> tuple[Tensor, ...]:
    # By identity, as the hash of a tensor is a function of Python.
    return tuple({id(key): key for key in keys}.values())


def _parts(transform: Transform, kind: type[Chain | Union]) -> tuple[Transform, ...]:
    # Not `isinstance`, which asks an abstract class: that takes longer than to compose the two.
    return transform.parts if type(transform) is kind else (transform,)


def check_covered(
    transform: Transform, given: Iterable[Tensor], giver: Transform | None = None
) -> None:
    """
    Check that a transform finds its keys.

    :param given: The keys that there are.
    :param giver: The transform they come from, if any.
    :raises TransformError: Naming the keys that are not among those given.
    """
    available = set(map(id, given))
    missing = [key for key in transform.needs if id(key) not in available]
    if missing:
        blame = "The values given to it lack" if giver is None else f"{giver!r} does not give"
        raise TransformError(
            f"{transform!r} needs keys that are missing. {blame} "
            f"{describe_keys(missing, limit=None)}."
        )


def describe_keys(keys: Iterable[Tensor], limit: int | None = 2) -> str:
    """Short words for keys: dtype, shape and origin of the first ones, then how many follow."""
    texts = [_describe_key(key) for key in keys]
    if limit is not None and len(texts) > limit + 1:
        texts = [*texts[:limit], f"{len(texts) - limit} more"]
    return ", ".join(texts) or "nothing"


def _describe_key(key: Tensor) -> str:
    origin = "" if key.grad_fn is None else f" of {key.grad_fn.name().removesuffix('Backward0')}"
    return f"{str(key.dtype).removeprefix('torch.')}{list(key.shape)}{origin}"
