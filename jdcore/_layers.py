"""Look-up of Gramian rules by the class of a layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from jdcore.spec import GramianRuleSpec

__all__ = ["CHOOSE", "CORE_RULES", "RUNTIME", "LayerTable"]

RUNTIME = "runtime"
"""Stands for the distribution in the qualified name of registered specs."""

CHOOSE = (
    "Choose one with jdcore.register(spec), or switch a distribution off with "
    "JDCORE_DISABLE_PLUGINS."
)

_RULES = "jdcore.autogram.rules"


def _core(name: str, layer: str, rule: str, summary: str) -> GramianRuleSpec:
    return GramianRuleSpec(
        name=name,
        layer=f"torch.nn:{layer}",
        rule=f"{_RULES}.{rule}",
        summary=summary,
        api_version=1,
    )


_OUTER = "Outer products of inputs and output gradients: Gram matrices of both, or direct."
_PATCHES = "Pixel Gram matrix, patches, or one weight gradient per row, by cost."
_STATISTICS = "Sums over positions of the normalized input times the output gradient."

CORE_RULES: tuple[GramianRuleSpec, ...] = (
    _core("linear", "Linear", "_linear:LinearRule", _OUTER),
    *(_core(f"conv{n}d", f"Conv{n}d", "_convolution:ConvolutionRule", _PATCHES) for n in (1, 2, 3)),
    *(
        _core(f"conv_transpose{n}d", f"ConvTranspose{n}d", "_convolution:ConvolutionRule", _PATCHES)
        for n in (1, 2, 3)
    ),
    _core("embedding", "Embedding", "_embedding:EmbeddingRule", "Rows scattered by index."),
    _core("layer_norm", "LayerNorm", "_norm:LayerNormRule", _STATISTICS),
    _core("rms_norm", "RMSNorm", "_norm:RMSNormRule", _STATISTICS),
    _core("group_norm", "GroupNorm", "_norm:GroupNormRule", _STATISTICS),
    *(
        _core(f"instance_norm{n}d", f"InstanceNorm{n}d", "_norm:InstanceNormRule", _STATISTICS)
        for n in (1, 2, 3)
    ),
    *(
        _core(f"batch_norm{n}d", f"BatchNorm{n}d", "_batch_norm:BatchNormRule", _STATISTICS)
        for n in (1, 2, 3)
    ),
    _core("prelu", "PReLU", "_prelu:PReLURule", "Sums of the negative inputs."),
)
"""The rules of the core, found through the same table as those of plugins."""


class LayerTable:
    """Rules by layer; several rules for one layer disable each other, unless one is registered."""

    def __init__(self) -> None:
        self._entries: list[Any] = []

    def add(self, entry: Any) -> None:
        self._entries.append(entry)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def claims(self, layer: str) -> list[Any]:
        """All entries for this layer, also by other paths if it was imported."""
        wanted = _identity(layer)
        return [entry for entry in self._entries if _identity(entry.spec.layer) == wanted]

    def clashes(self) -> dict[str, list[str]]:
        """Names of the rules that disable each other, by layer."""
        claims: dict[Any, list[Any]] = {}
        for entry in self._entries:
            claims.setdefault(_identity(entry.spec.layer), []).append(entry)
        return {
            min(entry.spec.layer for entry in entries): [e.qualified_name for e in entries]
            for entries in claims.values()
            if len(entries) > 1 and all(entry.distribution != RUNTIME for entry in entries)
        }

    def find(self, cls: type) -> list[Any]:
        """
        The entries for a class of layers: none, one, or several that clash.

        :param cls: The class of a module. A subclass that overrides ``forward`` is another layer.
        """
        for base in cls.__mro__:
            entries = [e for e in self._entries if _imported(e.spec.layer) is base]
            if entries:
                # What somebody registered in this process settles who serves the layer.
                entries = [e for e in entries if e.distribution == RUNTIME] or entries
                same = getattr(cls, "forward", None) is getattr(base, "forward", None)
                return entries if same else []
        return []


def _imported(path: str) -> Any:
    # An instance can only exist once its module was imported, so nothing is imported here.
    module, _, attribute = path.partition(":")
    return getattr(sys.modules.get(module), attribute, None)


def _identity(layer: str) -> Any:
    """The class of a layer if it was imported, which may go by several paths, else its path."""
    cls = _imported(layer)
    return layer if cls is None else id(cls)
