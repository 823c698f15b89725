from __future__ import annotations

import math


def decayed(rate: float, calls: int, exponent: float) -> float:
    """
    A rate that falls with the calls: ``rate / k^exponent``.

    :param calls: Number of calls before this one, which is call k.
    :param exponent: At least 0; so large that nothing is left, if need be.
    """
    # Powers of floats that are too small are zero, where those that are too large are errors and
    # those of integers have any number of digits.
    return rate * math.pow(calls + 1, -exponent)
