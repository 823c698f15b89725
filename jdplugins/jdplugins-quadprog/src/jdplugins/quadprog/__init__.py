"""Compiled solvers for the projection onto the dual cone: quadprog, and all that qpsolvers has."""
