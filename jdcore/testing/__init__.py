"""
The conformance kit: what every method has to satisfy, as tests that run from its spec.

First-party and third-party methods go through the same line::

    from jdcore.testing import conformance_tests

    test_conformance = conformance_tests("my-methods")

Scalarizers of theirs go through another::

    from jdcore.testing import scalarizer_tests

    test_scalarizers = scalarizer_tests("my-methods")

Rules of autogram are tried on calls of their operation::

    from jdcore.testing import OperationExample, gramian_rule_tests

    example = OperationExample(MyFunction.apply, make_inputs, make_operands)
    test_my_rule = gramian_rule_tests("my-methods:my_rule", example)

The tests need pytest: ``pip install jdcore[testing]``.
"""

from jdcore.testing._case import ConformanceError, NotApplicable
from jdcore.testing._check import ConformanceCheck
from jdcore.testing._rules import gramian_rule_tests, rule_checks
from jdcore.testing._scalarizers import scalarizer_checks, scalarizer_tests
from jdcore.testing._suite import checks_of, conformance_tests
from jdcore.testing._trial import OperationExample
from jdcore.testing.families import FAMILIES, family

__all__ = [
    "FAMILIES",
    "ConformanceCheck",
    "ConformanceError",
    "NotApplicable",
    "OperationExample",
    "checks_of",
    "conformance_tests",
    "family",
    "gramian_rule_tests",
    "rule_checks",
    "scalarizer_checks",
    "scalarizer_tests",
]
