"""The demo's task: its arithmetic, its splits and its options."""

from __future__ import annotations

from typing import Any

import pytest

from rim_peft.data.tasks import get_task
from rim_peft.data.tasks.potions import COLOURS, VERBS, Potions, apply_verb, split_of


def test_every_verb_permutes_the_colours_and_their_order_matters() -> None:
    for verb in VERBS:
        assert sorted(apply_verb(verb, colour) for colour in COLOURS) == sorted(COLOURS)
    assert apply_verb("boils", apply_verb("stirs", "red")) != apply_verb("stirs", apply_verb("boils", "red"))


def test_steps_and_answer_follow_from_the_question() -> None:
    for row in Potions(num_rows=50).rows("train"):
        *links, root, _ = row["question"].split(". ")
        colour = root.split()[-1]
        expected = [colour]
        for link in reversed(links):
            expected.append(apply_verb(link.split()[1], expected[-1]))
        assert [*row["steps"], row["answer"]] == expected
        assert row["length"] == len(row["steps"]) == len(links)


def test_splits_share_no_question_whatever_the_seeds() -> None:
    questions = {
        split: {
            row["question"] for seed in (0, 1) for row in Potions(num_rows=300, num_held_out=300, seed=seed).rows(split)
        }
        for split in ("train", "validation", "test")
    }
    assert not questions["train"] & (questions["validation"] | questions["test"])
    assert not questions["validation"] & questions["test"]
    for split, asked in questions.items():
        assert {split_of(question) for question in asked} == {split}


def test_the_same_options_give_the_same_rows() -> None:
    first, second = (list(Potions(num_rows=20, lengths=(3,)).rows("train")) for _ in range(2))
    assert first == second
    assert {row["length"] for row in first} == {3}
    assert first != list(Potions(num_rows=20, lengths=(3,), seed=1).rows("train"))


def test_weights_choose_how_often_a_length_comes() -> None:
    rows = list(Potions(num_rows=400, lengths=(1, 4), weights=(1.0, 3.0)).rows("train"))
    assert 0.65 < sum(row["length"] == 4 for row in rows) / 400 < 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "lengths: must hold numbers of steps from 1 to 15"),
        ({"lengths": [16]}, "lengths: must hold numbers of steps from 1 to 15"),
        ({"weights": [1.0]}, "weights: must hold a weight for each of the 4 lengths"),
        ({"num_rows": 0}, "num_rows, num_held_out: must be at least 1"),
        ({"steps": "numbers"}, "steps: must be one of 'values', 'sentences'"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("potions", **options)
