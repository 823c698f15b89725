"""
Aggregators and weightings as plain data.

A configuration is a mapping: the key ``name`` holds the registry name of a method, every other key
an argument of it. It may come from YAML, JSON, TOML or OmegaConf::

    name: upgrad
    pref_vector: [0.2, 0.8]
    solver: quadprog

:func:`jdcore.get_aggregator` and :func:`jdcore.get_weighting` build it (for scalarizers, which have
configurations too, :func:`jdcore.get_scalarizer`), :func:`to_config` is the
way back. Values are numbers, strings, booleans, None, lists, mappings, and

* tensors: a nested list for float32, ``{"data": [...], "dtype": "float64"}`` for anything else;
* weightings and aggregators within others: a configuration again. The adapters of the core are
  named ``gramian_aggregator`` and ``flattening``;
* solvers: their name, or a mapping of ``name`` and the arguments of the solver.

Names are looked up among registered methods and solvers only: no configuration can make jdcore
import anything else. Tensors are made on the CPU; state (see :class:`~jdcore.Stateful`) is no part
of a configuration.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

__all__ = ["to_config"]


def to_config(method: Any, /, *, omit: Collection[str] = ()) -> dict[str, Any]:
    """
    Describe an aggregator or a weighting as plain data. Arguments at their default are left out.

    :param method: An instance of a registered method, or an adapter of the core around one.
    :param omit: Names of arguments to leave out because they are no data, such as a generator; give
        them again when building, ``get_aggregator(config, generator=...)``.
    :returns: A dictionary that ``json.dumps`` takes and :func:`jdcore.get_aggregator` (or
        :func:`jdcore.get_weighting`) builds an equal object from.
    :raises ParameterTypeError: If the method or one of its arguments is no data; the path inside
        the configuration is named.

    >>> import torch, jdcore
    >>> aggregator = jdcore.get_aggregator("upgrad", pref_vector=torch.tensor([0.25, 0.75]))
    >>> jdcore.to_config(aggregator)
    {'name': 'upgrad', 'pref_vector': [0.25, 0.75]}
    >>> jdcore.get_aggregator(jdcore.to_config(aggregator))
    UPGrad(pref_vector=tensor([0.2500, 0.7500]), solver='native')
    """
    from jdcore.config._write import write  # imports torch, which `import jdcore` does without

    return write(method, "config", frozenset(omit))
