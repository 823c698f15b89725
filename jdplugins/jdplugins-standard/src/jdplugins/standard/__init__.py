"""The aggregation methods of the literature, with exact native solvers."""
