from jdcore.testing import scalarizer_tests

test_scalarizers = scalarizer_tests("jdplugins-standard")
