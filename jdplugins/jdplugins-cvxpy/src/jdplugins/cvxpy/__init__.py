"""Reference solvers: CAGrad by cvxpy, and NashMTL's convex-concave procedure by ECOS."""
