"""
Pictures of Jacobian descent: the dual cone, trajectories, conflicts and weights over time.

They need the extra ``jdcore[plot]`` (matplotlib). Every function draws into axes that it is given,
or into a figure of its own, and returns the axes; figures need no display.
"""

from jdcore.monitor.plots._cone import dual_cone
from jdcore.monitor.plots._history import conflicts_over_time, weights_over_time
from jdcore.monitor.plots._plane import pareto_front, trajectories
from jdcore.monitor.plots._style import COLOURS, save

__all__ = [
    "COLOURS",
    "conflicts_over_time",
    "dual_cone",
    "pareto_front",
    "save",
    "trajectories",
    "weights_over_time",
]
