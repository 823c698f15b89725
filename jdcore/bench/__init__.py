"""
The published experiments behind ``jdcore bench``, small enough for two cores.

Nothing here is imported before the command runs; it needs the extra ``jdcore[demo]``.
"""
