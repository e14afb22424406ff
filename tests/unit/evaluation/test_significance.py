"""Intervals and paired tests against values worked out by other means."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from rim_peft.evaluation.accuracy import paired_difference, pooled_difference
from rim_peft.evaluation.scores import Score


@pytest.mark.parametrize(("correct", "rows"), [(0, 10), (10, 10), (3, 7), (450, 1000), (1, 250)])
def test_the_interval_is_wilsons(correct: int, rows: int) -> None:
    theirs = binomtest(correct, rows).proportion_ci(method="wilson")
    assert Score(correct, rows).interval == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_a_score_tells_its_interval() -> None:
    assert Score(8, 10).to_dict() == {
        "num_correct": 8,
        "num_rows": 10,
        "accuracy": 0.8,
        "standard_error": 0.126491,
        "low": 0.490162,
        "high": 0.943318,
    }


@pytest.mark.parametrize(("only_a", "only_b", "same"), [(8, 1, 3), (0, 0, 5), (5, 5, 90), (0, 12, 400), (30, 10, 60)])
def test_pairs_are_tested_exactly(only_a: int, only_b: int, same: int) -> None:
    first = [True] * only_a + [False] * only_b + [True] * same
    second = [False] * only_a + [True] * only_b + [True] * same
    found = paired_difference(first, second)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found.p_value == pytest.approx(expected)
    differences = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / len(differences)
    assert found.difference == pytest.approx(mean)
    assert found.standard_error == pytest.approx((variance / len(differences)) ** 0.5)


def test_pairs_need_the_same_rows() -> None:
    with pytest.raises(ValueError, match=r"rows: .*got 1(,| and) 2"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [])


def test_seeds_that_judge_the_same_rows_are_no_rows_of_their_own() -> None:
    first, second = [True, True, False, True] * 25, [False, True, False, False] * 25
    once, thrice = pooled_difference([(first, second)]), pooled_difference([(first, second)] * 3)
    assert (once.difference, once.standard_error) == pytest.approx((thrice.difference, thrice.standard_error))
    assert once.p_value == pytest.approx(thrice.p_value)
    assert (thrice.only_a, thrice.only_b) == (150, 0)
    plain = paired_difference(first, second)
    assert (once.difference, once.standard_error) == pytest.approx((plain.difference, plain.standard_error))
    opposite = pooled_difference([(first, second), (second, first)])
    assert (opposite.difference, opposite.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match="all of the same rows"):
        pooled_difference([(first, second), (first[:3], second[:3])])


def test_a_few_rows_of_several_seeds_are_few_rows() -> None:
    """Without spread, a normal distribution would be certain of three rows; of 8 flips of signs 2 are as uneven."""
    found = pooled_difference([([True] * 5, [False] * 3 + [True] * 2)] * 3)
    assert found.p_value == pytest.approx(2 / 2**3)
    assert pooled_difference([([True] * 3, [False] * 3)] * 2).p_value == pytest.approx(2 / 2**3)
    assert pooled_difference([([True] * 50, [False] * 50)] * 2).p_value < 1e-9
