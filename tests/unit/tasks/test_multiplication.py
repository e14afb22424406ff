"""Multiplication: iCoT's own lines, digit by digit, and disjoint splits."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rim_peft.tasks import get_task
from rim_peft.tasks.multiplication import Multiplication

# Lines of iCoT's data in its form: question || chain of thought #### answer.
PUBLISHED = [
    "5 6 3 2 * 7 4 3 4||5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 ) + 0 0 0 0 6 4 9 0 "
    "#### 5 5 6 0 8 2 0 1",
    "0 5 8 8 * 8 0 9 6||0 0 8 0 7 + 0 0 0 0 0 0 ( 0 0 8 0 7 0 ) + 0 0 0 5 6 9 7 ( 0 0 8 5 3 0 8 ) + 0 0 0 0 0 1 3 5 "
    "#### 0 0 8 5 3 1 1 6",
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_writes_what_icot_wrote(line: str) -> None:
    question, chain, answer = re.split(r"\|\|| #### ", line)
    left, right = (int("".join(factor.split())[::-1]) for factor in question.split("*"))
    row = Multiplication().make_row(left, right)
    assert (row["question"], " + ".join(row["steps"]), row["answer"]) == (question, chain, answer)


@pytest.mark.parametrize("num_digits", [2, 3, 7])
def test_steps_add_up_to_the_answer(num_digits: int) -> None:
    def number(text: str) -> int:
        return int("".join(text.split())[::-1])

    for row in get_task("multiplication", num_digits=num_digits, num_rows=50, num_held_out=50).rows("train"):
        left, right = map(number, row["question"].split("*"))
        assert len(str(left)) == len(str(right)) == len(row["steps"]) == num_digits
        parts = [number(step.partition("(")[0]) for step in row["steps"]]
        assert sum(parts) == left * right == number(row["answer"])
        for place, step in enumerate(row["steps"][1:-1], start=1):
            assert number(step.partition("(")[2].rstrip(" )")) == sum(parts[: place + 1])


def test_splits_share_no_question_and_repeat_none() -> None:
    splits = {
        split: [
            row["question"]
            for seed in (0, 1)
            for row in Multiplication(num_digits=2, num_rows=500, num_held_out=200, seed=seed).rows(split)
        ]
        for split in ("train", "validation", "test")
    }
    assert [len(questions) for questions in splits.values()] == [1000, 400, 400]
    assert len(set(splits["train"][:500])) == 500
    train, validation, test = map(set, splits.values())
    assert not train & validation
    assert not (train | validation) & test


def test_answers_are_judged_digit_by_digit() -> None:
    task = get_task("multiplication")
    assert task.judge("55608201", "5 5 6 0 8 2 0 1") == {"exact-digits": True}
    assert not task.is_correct("5 5 6 0 8 2 0 1 0", "5 5 6 0 8 2 0 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_digits": 1}, "num_digits: must be at least 2, got 1"),
        ({"num_rows": 0}, "num_rows, num_held_out: must be at least 1"),
        ({"num_digits": 2}, "num_rows: must be at most 5832 with 2 digits, got 10000. Use more digits"),
        ({"num_digits": 2, "num_rows": 9}, "num_held_out: must be at most 324 with 2 digits, got 1000"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("multiplication", **options)


def test_a_split_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="split: must be one of train, validation, test, got 'dev2'"):
        list(Multiplication().rows("dev2"))
