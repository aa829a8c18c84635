"""Ramps that rise to 1 early in a run, as functions of the share of the run that is done."""

import math


def sigmoid(done: float, length: float) -> float:
    """Return exp(-5 (1 - done / length)^2), and 1 after `length` (Laine and Aila, 2017)."""
    return math.exp(-5 * (1 - min(1.0, done / length)) ** 2) if length else 1.0


def linear(done: float, length: float) -> float:
    """Return done / length, and 1 after `length`."""
    return min(1.0, done / length) if length else 1.0
