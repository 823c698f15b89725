"""
The training behind ``jdcore demo``: two overlaid handwritten digits, two tasks, two methods.

Nothing here is imported before the command runs; it needs the extra ``jdcore[demo]``.
"""
