from jdcore.testing import conformance_tests

test_conformance = conformance_tests("jdplugins-robust")
