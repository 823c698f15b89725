"""
The classes of a distribution as attributes of its package: ``from my_methods import NormMean``.

A package imports none of its methods, so that listing stays fast; its ``__init__.py`` hands out the
classes when somebody asks for one::

    from jdcore.exports import exports_of

    __getattr__, __dir__ = exports_of("my-methods")

What an editor and a type checker see stands beside it in ``__init__.pyi``, which the command
``jdcore stubs my-methods`` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jdcore._discovery import AGGREGATOR, KINDS, Kind, normalize_distribution
from jdcore._registry import registry
from jdcore.errors import ParameterError

__all__ = ["exports_of"]


def exports_of(
    distribution: str, kind: str = "aggregators"
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Make the ``__getattr__`` and ``__dir__`` of a package.

    :param distribution: Name of the distribution that the package belongs to.
    :param kind: ``"aggregators"``, for the classes of methods and of their weightings, or
        ``"scalarizers"``.
    :returns: Two functions. The first makes the class of a name, the same object that
        :func:`jdcore.get_aggregator`, :func:`jdcore.get_weighting` or
        :func:`jdcore.get_scalarizer` instantiates, or raises an AttributeError; the second lists
        the names.
    :raises ParameterError: If ``kind`` is neither.
    """
    known = {f"{each.word}s": each for each in KINDS}
    if kind not in known:
        raise ParameterError("kind", f"one of {', '.join(map(repr, known))}", repr(kind))
    wanted, chosen = normalize_distribution(distribution), known[kind]

    def get(name: str) -> Any:
        # Only classes are asked for: the names of submodules must not lead to a look-up, which
        # would import the plugin that is being imported.
        if name[:1].isupper():
            make = _makers(wanted, chosen).get(name)
            if make is not None:
                return make()
        raise AttributeError(f"{distribution} provides no class {name!r}", name=name)

    return get, lambda: sorted(_makers(wanted, chosen))


def _makers(distribution: str, kind: Kind) -> dict[str, Callable[[], type]]:
    from jdcore import _methods  # imports torch, which listing does without

    find = _methods.aggregator_class if kind is AGGREGATOR else _methods.scalarizer_class
    # By qualified names: the package gives its own classes, whoever else claims their names.
    makers: dict[str, Callable[[], type]] = {}
    records = [record for record in registry.records() if record.distribution == distribution]
    for spec in (spec for record in records for spec in kind.specs_of(record)):
        name = f"{distribution}:{spec.name}"
        makers[spec.class_name] = partial(find, name)
        if kind is AGGREGATOR and spec.weighting is not None:
            makers[f"{spec.class_name}Weighting"] = partial(_methods.weighting_class, name)
    return makers
