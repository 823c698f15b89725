from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jdcore.graph._operations import is_steady
from jdcore.graph._site import Site
from jdcore.graph.shares import Share


@runtime_checkable
class GramianRule(Protocol):
    """
    A closed form of autogram for one operation of the graph; a plain function is one.

    It turns the gradients at the results of an operation, and what the operation saved, into the
    Jacobian with respect to one of its operands that belongs to no sample, mostly a parameter. The
    Jacobian is handed over as a :class:`~jdcore.autogram.Share`, in a factored form that never
    holds it where that can be avoided: :class:`~jdcore.autogram.Outer` for what multiplies,
    :class:`~jdcore.autogram.Dense` for small operands whose rows are cheap. An operand that is used
    several times, or computed from parameters, is the business of the library, not of the rule.

    Laws that every rule obeys:

    * rows agree with those of the backward pass of the operation, to rounding;
    * where it does not hold, whatever the reason, it raises :class:`~jdcore.autogram.NoRule`; the
      operation is then called once for each sample. Where that would be wrong as well, it raises
      :class:`~jdcore.UnservedGraphError` with operation, reason and remedy; the layer is added;
    * it changes neither the gradients nor what was saved, and has no state.

    :func:`jdcore.testing.gramian_rule_tests` checks all of this.

    A rule for a ``torch.autograd.Function`` that multiplies features by a parameter, and calls
    ``ctx.save_for_backward(x, scale)`` in its forward::

        def layer_scale(site, operand):
            if operand != 1:
                raise NoRule
            x, _ = site.node.saved_tensors
            return site.broadcast(site.grad * x, 1)
    """

    def __call__(self, site: Site, operand: int, /) -> Share:
        """
        :param site: The operation, with gradients of K losses for each of B samples.
        :param operand: Which operand is meant, as numbered among the tensors in the arguments of
            the operation.
        :returns: Its share of the Jacobian, K B rows of its shape.
        :raises NoRule: If the rule does not hold here.
        """


Rule = Callable[[Site, int], Share]

RULES: dict[str, Rule] = {}
"""The rules of the core, by the name of a node."""


FOR_LAYERS: set[str] = set()
"""Names of nodes whose rules serve several operations at once, see :class:`Layers`."""


def rule(*names: str, layers: bool = False) -> Callable[[Rule], Rule]:
    """
    Add a function to the table, as the rule of nodes of some names.

    :param layers: Whether it reads the site alone, not the node, so that it serves
        :class:`~jdcore.graph._site.Layers` as well.
    """

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        FOR_LAYERS.update(names if layers else ())
        return function

    return add


class Rules:
    """What is known of operations; subclasses know more."""

    def find(self, name: str, node: Any) -> Rule | None:
        """
        The rule of an operation.

        :param name: The name of the node.
        :param node: The node.
        """
        return RULES.get(name)

    def steady(self, name: str, node: Any) -> bool:
        """Whether the form of an operation alone decides which entries depend on which."""
        return is_steady(name)
