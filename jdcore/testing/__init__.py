"""
The conformance kit: what every method has to satisfy, as tests that run from its spec.

First-party and third-party methods go through the same line::

    from jdcore.testing import conformance_tests

    test_conformance = conformance_tests("my-methods")

The tests need pytest: ``pip install jdcore[testing]``.
"""

from jdcore.testing._case import ConformanceError, NotApplicable
from jdcore.testing._suite import ConformanceCheck, checks_of, conformance_tests
from jdcore.testing.families import FAMILIES, family

__all__ = [
    "FAMILIES",
    "ConformanceCheck",
    "ConformanceError",
    "NotApplicable",
    "checks_of",
    "conformance_tests",
    "family",
]
