"""Tails of the normal and of Student's t, and how one is read as the other."""

from __future__ import annotations

from scipy import special

SMALLEST = 1e-100  # a tail below is taken for this: its quantile is finite


def normal_tail(z: float) -> float:
    """The chance of a standard normal above z."""
    return float(special.ndtr(-z))


def normal_critical(tail: float) -> float:
    """Where a standard normal has `tail` above."""
    return -float(special.ndtri(max(tail, SMALLEST)))


def student_tail(t: float, degrees: float) -> float:
    """The chance of Student's t above t."""
    return float(special.stdtr(degrees, -t))


def student_critical(tail: float, degrees: float) -> float:
    """Where Student's t has `tail` above."""
    return -float(special.stdtrit(degrees, max(tail, SMALLEST)))


def as_normal(t: float, degrees: float) -> float:
    """The z that is as surprising for a normal as t is for Student's t."""
    size = normal_critical(student_tail(abs(t), degrees))
    return size if t >= 0 else -size


def as_student(z: float, degrees: float) -> float:
    """The t that is as surprising for Student's t as z is for a normal. z: 0 or more."""
    return student_critical(normal_tail(z), degrees)
