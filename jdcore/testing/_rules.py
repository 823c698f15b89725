from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jdcore._registry import registry
from jdcore.autogram._rules import core_entry
from jdcore.testing._case import ConformanceError
from jdcore.testing._check import ConformanceCheck, checks_by, parametrized_test
from jdcore.testing._rule_laws import ON_EXAMPLES, ON_REFUSED, RuleCase
from jdcore.testing._trial import OperationExample


def rule_checks(
    rule: str, *examples: OperationExample, refused: Sequence[OperationExample] = ()
) -> list[ConformanceCheck]:
    """
    The checks of a Gramian rule. Arguments and errors as :func:`gramian_rule_tests`.

    :returns: One per law and example.
    """
    entry = core_entry(rule.removeprefix("jdcore:")) or registry.gramian_rule(rule)
    if not examples:
        raise ConformanceError(f"{rule} cannot be tried without an example of its operation")

    def of(
        example: OperationExample, laws: Iterable[Callable[[Any], None]]
    ) -> list[ConformanceCheck]:
        subject = f"{entry.qualified_name}-{example.label}"
        return checks_by(laws, subject, RuleCase(entry, example), {})

    served = [check for example in examples for check in of(example, ON_EXAMPLES)]
    return served + [check for example in refused for check in of(example, ON_REFUSED)]


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
        ``"distribution:name"``; or the name of an operation that the core has a rule for.
    :param examples: Calls that the rule serves: one per option and per number of dimensions that
        the rule treats in a way of its own.
    :param refused: Calls of the same operation for which the rule raises NoRule.
    :returns: A parametrized test function.
    :raises ConformanceError: If there is no example.
    :raises UnknownNameError: If there is no such rule.
    """
    return parametrized_test(rule_checks(rule, *examples, refused=refused))
