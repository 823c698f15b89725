from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import field, frozen

from jdcore._registry import get_gramian_rule, registry
from jdcore.testing._case import ConformanceError, NotApplicable
from jdcore.testing._pytest import parametrized_test
from jdcore.testing._rule_laws import ON_EXAMPLES, ON_REFUSED, WITH_COST, RuleCase
from jdcore.testing._trial import LayerExample


@frozen
class RuleCheck:
    """
    One check of one Gramian rule on one layer.

    :param rule: Name of the rule, ``"distribution:name"``.
    :param example: The layer.
    :param check: What is checked.
    """

    rule: str
    example: LayerExample = field(repr=False)
    check: Callable[[RuleCase], None]

    def __str__(self) -> str:
        label = self.example.label or type(self.example.layer()).__name__
        return f"{self.rule}-{label}-{self.check.__name__}"

    def run(self) -> None:
        """
        Run the check.

        :raises ConformanceError: If the rule fails it.
        :raises NotApplicable: If the layer has nothing that the check looks at.
        """
        entry = registry.gramian_rule(self.rule)
        try:
            self.check(RuleCase(entry, get_gramian_rule(entry), self.example))
        except (ConformanceError, NotApplicable):
            raise
        except Exception as error:
            raise ConformanceError(f"{type(error).__name__}: {error}") from error


def rule_checks(
    rule: str, *examples: LayerExample, refused: Sequence[LayerExample] = ()
) -> list[RuleCheck]:
    """
    The checks of a Gramian rule. Arguments and errors as :func:`gramian_rule_tests`.

    :returns: One per law and layer.
    """
    entry = registry.gramian_rule(rule)
    if not examples:
        raise ConformanceError(f"{rule} cannot be tried without an example of its layer")
    optional = WITH_COST if hasattr(get_gramian_rule(entry), "beats_rows") else ()
    tried = [(example, check) for example in examples for check in (*ON_EXAMPLES, *optional)]
    tried += [(example, check) for example in refused for check in ON_REFUSED]
    return [RuleCheck(entry.qualified_name, example, check) for example, check in tried]


def gramian_rule_tests(
    rule: str, *examples: LayerExample, refused: Sequence[LayerExample] = ()
) -> Any:
    """
    Make a pytest test that tries a Gramian rule on layers.

    Whatever the rule yields is compared with the Jacobian row by row, in float64 and in lower
    precision, for one and several losses per sample, for samples that span several entries and for
    a whole batch, with frozen, reused and shared parameters::

        import torch
        from jdcore.testing import LayerExample, gramian_rule_tests

        test_layer_scale = gramian_rule_tests(
            "my-methods:layer_scale",
            LayerExample(lambda: LayerScale(4), lambda n: (torch.randn(n, 4),)),
            LayerExample(lambda: LayerScale(4), lambda n: (torch.randn(n, 7, 4),), label="3-D"),
        )

    :param rule: Name of a rule of an installed distribution or a registered one, plain or
        ``"distribution:name"``.
    :param examples: Layers that the rule serves, with arguments: one per option and per number of
        dimensions that the rule treats in a way of its own.
    :param refused: Layers of the same type that the rule refuses.
    :returns: A parametrized test function.
    :raises ConformanceError: If there is no example.
    :raises UnknownNameError: If there is no such rule.
    """
    return parametrized_test(rule_checks(rule, *examples, refused=refused))
