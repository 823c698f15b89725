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
from typing import Any

from jdcore._discovery import normalize_distribution
from jdcore._registry import registry

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
    """
    wanted = normalize_distribution(distribution)

    def get(name: str) -> Any:
        # Only classes are asked for: the names of submodules must not lead to a look-up, which
        # would import the plugin that is being imported.
        if name[:1].isupper():
            make = _makers(wanted, kind).get(name)
            if make is not None:
                return make()
        raise AttributeError(f"{distribution} provides no class {name!r}", name=name)

    return get, lambda: sorted(_makers(wanted, kind))


def _makers(distribution: str, kind: str) -> dict[str, Callable[[], type]]:
    from jdcore import _methods  # imports torch, which listing does without

    makers: dict[str, Callable[[], type]] = {}
    for record in registry.records():
        if record.distribution != distribution:
            continue
        for scalarizer in record.scalarizers if kind == "scalarizers" else ():
            qualified = f"{distribution}:{scalarizer.name}"
            makers[scalarizer.class_name] = _maker(_methods.scalarizer_class, qualified)
        for spec in record.aggregators if kind == "aggregators" else ():
            qualified = f"{distribution}:{spec.name}"
            makers[spec.class_name] = _maker(_methods.aggregator_class, qualified)
            if spec.weighting is not None:
                name = f"{spec.class_name}Weighting"
                makers[name] = _maker(_methods.weighting_class, qualified)
    return makers


def _maker(find: Callable[[str], type], qualified_name: str) -> Callable[[], type]:
    return lambda: find(qualified_name)
