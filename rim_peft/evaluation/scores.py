"""Counted verdicts: a share of correct answers with its confidence interval, overall and by number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_Z = 1.959964  # 95 % of a normal distribution is within this many standard deviations


@dataclass(frozen=True)
class Score:
    """A share of correct answers.

    Attributes:
        num_correct: correct answers.
        num_rows: answers judged.
    """

    num_correct: int
    num_rows: int

    @property
    def accuracy(self) -> float:
        """The share, 0 to 1."""
        return self.num_correct / self.num_rows

    @property
    def standard_error(self) -> float:
        """Standard error of the share, ``sqrt(p (1 - p) / n)``."""
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / self.num_rows)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the share.

        Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927. Unlike accuracy plus
            and minus two standard errors, it also holds near 0 and 1.
        """
        n, p = self.num_rows, self.accuracy
        center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return min(p, center - half), max(p, center + half)  # rounding must not push the share outside

    def to_dict(self) -> dict[str, float]:
        """Return counts, accuracy, standard error and the interval (``low``, ``high``), rounded to 6 digits."""
        low, high = self.interval
        rounded = {"accuracy": self.accuracy, "standard_error": self.standard_error, "low": low, "high": high}
        return {**asdict(self), **{name: round(value, 6) for name, value in rounded.items()}}


def score(right: Sequence[bool]) -> Score:
    """Count verdicts."""
    return Score(num_correct=sum(right), num_rows=len(right))


def score_by_length(right: Sequence[bool], lengths: Sequence[int | None]) -> dict[int, Score]:
    """Count verdicts by number of steps, without the rows that have no steps."""
    present = sorted({length for length in lengths if length is not None})
    return {n: score([ok for ok, length in zip(right, lengths, strict=True) if length == n]) for n in present}


def score_overall_and_by_length(right: Sequence[bool], lengths: Sequence[int | None]) -> dict[int | str, Score]:
    """Count verdicts overall (``"all"``) and by number of steps."""
    found: dict[int | str, Score] = {"all": score(right)}
    for length, counted in score_by_length(right, lengths).items():
        found[length] = counted
    return found
