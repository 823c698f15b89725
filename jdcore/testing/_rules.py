from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import field, frozen

from jdcore._registry import get_gramian_rule, registry
from jdcore.testing._case import ConformanceError, NotApplicable
from jdcore.testing._pytest import parametrized_test
from jdcore.testing._rule_laws import ON_EXAMPLES, ON_REFUSED, RuleCase
from jdcore.testing._trial import OperationExample


@frozen
class RuleCheck:
    """
    One check of one Gramian rule on one call.

    :param rule: Name of the rule, ``"distribution:name"``.
    :param example: The call.
    :param check: What is checked.
    """

    rule: str
    example: OperationExample = field(repr=False)
    check: Callable[[RuleCase], None]

    def __str__(self) -> str:
        return f"{self.rule}-{self.example.label}-{self.check.__name__}"

    def run(self) -> None:
        """
        Run the check.

        :raises ConformanceError: If the rule fails it.
        :raises NotApplicable: If the call has nothing that the check looks at.
        """
        entry = registry.gramian_rule(self.rule)
        try:
            self.check(RuleCase(entry, get_gramian_rule(entry), self.example))
        except (ConformanceError, NotApplicable):
            raise
        except Exception as error:
            raise ConformanceError(f"{type(error).__name__}: {error}") from error


def rule_checks(
    rule: str, *examples: OperationExample, refused: Sequence[OperationExample] = ()
) -> list[RuleCheck]:
    """
    The checks of a Gramian rule. Arguments and errors as :func:`gramian_rule_tests`.

    :returns: One per law and example.
    """
    entry = registry.gramian_rule(rule)
    if not examples:
        raise ConformanceError(f"{rule} cannot be tried without an example of its operation")
    tried = [(example, check) for example in examples for check in ON_EXAMPLES]
    tried += [(example, check) for example in refused for check in ON_REFUSED]
    return [RuleCheck(entry.qualified_name, example, check) for example, check in tried]


def gramian_rule_tests(
    rule: str, *examples: OperationExample, refused: Sequence[OperationExample] = ()
) -> Any:
    """
    Make a pytest test that tries a Gramian rule on calls of its operation.

    Whatever the rule returns is compared with backward passes row by row, for one and several
    losses per sample, for samples that span several entries, and for each operand by itself::

        import torch
        from jdcore.testing import OperationExample, gramian_rule_tests

        test_layer_scale = gramian_rule_tests(
            "my-methods:layer_scale",
            OperationExample(
                LayerScaleFunction.apply,
                inputs=lambda n: (torch.randn(n, 4),),
                operands=lambda: (torch.randn(4),),
            ),
        )

    :param rule: Name of a rule of an installed distribution or a registered one, plain or
        ``"distribution:name"``.
    :param examples: Calls that the rule serves: one per option and per number of dimensions that
        the rule treats in a way of its own.
    :param refused: Calls of the same operation for which the rule raises NoRule.
    :returns: A parametrized test function.
    :raises ConformanceError: If there is no example.
    :raises UnknownNameError: If there is no such rule.
    """
    return parametrized_test(rule_checks(rule, *examples, refused=refused))
