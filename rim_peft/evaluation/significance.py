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
            likely to be the first's as the second's. The trained weights are held fixed: it says whether these two
            adapters differ, not whether two methods would with other seeds.
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


def pooled_difference(pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> PairedDifference:
    """Compare two methods on the same rows over several seeds.

    Rows are what is drawn at random here: a row's verdicts are averaged over the seeds before the rows' spread is
    taken, since seeds that judge the same row are no rows of their own. What another seed would give is not in it.

    Args:
        pairs: for each seed the verdicts of the first method and of the second, on the same rows.

    Returns:
        Counts of all seeds together; the p-value is that of a normal distribution.

    Raises:
        ValueError: there are no rows, or not equally many.
    """
    each = [paired_difference(first, second) for first, second in pairs]
    sizes = {len(first) for first, _ in pairs}
    if len(sizes) != 1:
        raise ValueError(f"pairs: must be at least one, all of the same rows, got {sorted(sizes)} rows.")
    rows = zip(*([int(a) - int(b) for a, b in zip(first, second, strict=True)] for first, second in pairs), strict=True)
    means = [sum(row) / len(pairs) for row in rows]
    difference = sum(means) / len(means)
    error = math.sqrt(sum((mean - difference) ** 2 for mean in means)) / len(means)
    p_value = math.erfc(abs(difference) / error / math.sqrt(2)) if error else float(difference == 0)
    return PairedDifference(
        difference, error, sum(one.only_a for one in each), sum(one.only_b for one in each), p_value
    )
