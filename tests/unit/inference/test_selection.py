"""Choosing an answer without knowing the right one."""

from __future__ import annotations

from rim_peft.inference.readout import select_by_confidence, select_by_score, select_by_vote, select_final


def test_the_last_block_is_rims_own() -> None:
    assert select_final(3, 4).tolist() == [3, 3, 3]


def test_votes_are_counted_by_answer_and_ties_go_to_the_later_block() -> None:
    answers = [
        ["a", "a", "b", "c"],  # two for a, whose later block is the second
        ["a", "b", "c", "d"],  # a tie of four
        ["a", "b", "b", "a"],  # a tie of two
        ["a", None, None, None],  # readouts without an answer do not vote
        [None, None, None, None],
    ]
    assert select_by_vote(answers).tolist() == [1, 3, 3, 0, 3]


def test_confidence_and_scores_take_the_largest_and_of_equals_the_later() -> None:
    values = [[-1.0, -0.5, -2.0], [-0.1, -0.1, -3.0], [float("-inf")] * 3]
    assert select_by_confidence(values).tolist() == [1, 1, 2]
    assert select_by_score(values).tolist() == [1, 1, 2]
