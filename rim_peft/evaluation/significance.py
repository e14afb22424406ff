"""Whether two methods differ, judged on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedDifference:
    """What two methods' verdicts on the same rows say about their difference.

    Attributes:
        difference: accuracy of the first minus that of the second.
        standard_error: of the difference, from the rows on which the two disagree.
        only_a: rows that the first alone has right.
        only_b: rows that the second alone has right.
        p_value: two-sided, of McNemar's exact test: how likely so uneven a split of these rows is, if each were as
            likely to be the first's as the second's.
    """

    difference: float
    standard_error: float
    only_a: int
    only_b: int
    p_value: float


def paired_difference(right_a: Sequence[bool], right_b: Sequence[bool]) -> PairedDifference:
    """Compare two methods on the same rows.

    >>> found = paired_difference([True] * 9 + [False], [False] * 8 + [True] * 2)
    >>> found.only_a, found.only_b, round(found.p_value, 4)
    (8, 1, 0.0391)

    Args:
        right_a: whether the first method has each row right.
        right_b: the same of the second.

    Raises:
        ValueError: there are no rows, or not equally many.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, 1947; the exact form
        is the sign test of the rows that differ.
    """
    if not right_a or len(right_a) != len(right_b):
        raise ValueError(
            f"rows: both methods must have the same ones, at least one, got {len(right_a)}, {len(right_b)}."
        )
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    n, differing = len(right_a), only_a + only_b
    difference = (only_a - only_b) / n
    # The variance of a mean of +1, -1 and 0.
    error = math.sqrt((differing / n - difference**2) / n)
    tail = sum(math.comb(differing, k) for k in range(min(only_a, only_b) + 1))
    return PairedDifference(difference, error, only_a, only_b, min(1.0, 2 * tail / 2**differing))
