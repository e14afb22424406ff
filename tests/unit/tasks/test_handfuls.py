"""Word problems with small numbers: every one is read back, and no part of it gives the answer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from rim_peft.tasks import get_task
from rim_peft.tasks.handfuls import LARGEST, OPERATIONS, read_chain
from rim_peft.tasks.stories import SPLITS

ROWS = list(get_task("handfuls", num_rows=4000).rows("train"))


@pytest.mark.parametrize("order", ["reverse", "shuffled", "forward"])
def test_a_question_tells_its_chain_and_each_number_of_it(order: str) -> None:
    task: Any = get_task("handfuls", num_rows=400, order=order)
    for row in task.rows("train"):
        given, chain = read_chain(row["question"])
        assert str(given) == row["steps"][0]
        assert len(chain) == len(row["steps"]) == row["length"]
        values = [*row["steps"], row["answer"]]
        assert all(re.fullmatch(f"[1-{LARGEST}]", value) for value in values)
        assert [task.answer_from(row["question"], step, value) for step, value in enumerate(values)] == [
            row["answer"]
        ] * len(values)
        assert " 1 " not in row["question"]  # which would need another noun


def test_every_wording_is_met_and_equations_are_those_of_the_values() -> None:
    kinds = Counter(kind for row in ROWS for kind, _ in read_chain(row["question"])[1])
    assert kinds.keys() == OPERATIONS.keys()
    assert min(kinds.values()) > sum(kinds.values()) / 30
    for values, equations in zip(
        ROWS, get_task("handfuls", num_rows=4000, steps="equations").rows("train"), strict=True
    ):
        assert values["question"] == equations["question"]
        given, *others = equations["steps"]
        assert [given, *(other.partition("=")[2] for other in others)] == [*values["steps"], values["answer"]]
        assert all(eval(left) == int(right) for left, _, right in (other.partition("=") for other in others))  # noqa: S307


def test_neither_the_last_operations_nor_the_sum_of_the_numbers_give_the_answer() -> None:
    """The best guess that knows the last operation, or the last two, and the share that a sum gets right."""
    for count, most in ((1, 0.35), (2, 0.55)):
        answers: dict[Any, Counter[str]] = defaultdict(Counter)
        for row in ROWS:
            if row["length"] > count:
                answers[tuple(read_chain(row["question"])[1][-count:])][row["answer"]] += 1
        num_rows = sum(sum(found.values()) for found in answers.values())
        assert sum(max(found.values()) for found in answers.values()) / num_rows < most
    sums = [sum(map(int, re.findall(r"\d+", row["question"]))) == int(row["answer"]) for row in ROWS]
    assert sum(sums) / len(sums) < 0.1


def test_splits_share_no_question() -> None:
    task: Any = get_task("handfuls", num_rows=500, num_held_out=500)
    questions = [{row["question"] for row in task.rows(split)} for split in SPLITS]
    assert not any(first & second for index, first in enumerate(questions) for second in questions[:index])


def test_other_texts_are_refused() -> None:
    task: Any = get_task("handfuls")
    for text in ("How many?", "Ann has 3 pens. How many pens does Ben have?", "Ann has 3 pens. Ben has 2 pens. Why?"):
        with pytest.raises(ValueError, match="question: must be a question of task 'handfuls', got"):
            task.answer_from(text, 0, "3")
    with pytest.raises(ValueError, match="step: must be from 0 to the chain's length 2, got 3"):
        task.answer_from(next(iter(get_task("handfuls", lengths=[2]).rows("train")))["question"], 3, "3")
    with pytest.raises(ValueError, match="lengths: must hold numbers of steps from 1 to 29, got"):
        get_task("handfuls", lengths=[30])
