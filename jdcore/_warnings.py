from __future__ import annotations

import sys
import warnings

# Frames of these packages are ours, or stand between ours and those of the user (torch.no_grad as a
# decorator, the backward pass, hooks).
_INSIDE = ("jdcore", "jdplugins", "torch", "contextlib")


def warn(warning: Warning) -> None:
    """
    Warn at the line of the user's code that called into jdcore.

    :param warning: An instance; its class is the category.
    """
    # `skip_file_prefixes` would do this from Python 3.12 on.
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(warning, stacklevel=level - 1)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in _INSIDE
