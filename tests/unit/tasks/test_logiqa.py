"""LogiQA: problems written by hand in the published forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.examples import Example, RowError
from rim_peft.tasks import get_task

LINES = ["", "c", "All a are b.", "Which follows?", "A.One.", "B. Two.", "C.Three.", "D.Four."]
QUESTION = "All a are b.\nWhich follows?\nA. One.\nB. Two.\nC. Three.\nD. Four."
OPTIONS = ["One.", "Two.", "Three.", "Four."]
EXPECTED = Example(QUESTION, answer="C")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "\n".join(LINES)},
        {"context": "All a are b.", "query": "Which follows?", "options": OPTIONS, "correct_option": 2},
        {"context": "All a are b.", "query": "Which follows?", "options": OPTIONS, "correct_option": "2"},
        {"context": "All a are b.", "question": "Which follows?", "options": OPTIONS, "label": "c"},
        {"id": 1, "text": "All a are b.", "question": "Which follows?", "options": OPTIONS, "answer": 2, "type": {}},
        {"context": "All a are b.", "question": "Which follows?", "options": LINES[4:], "answer": "C"},
        {"text": json.dumps({"text": "All a are b.", "question": "Which follows?", "options": OPTIONS, "answer": 2})},
    ],
)
def test_every_form_gives_the_same_example(row: dict[str, Any]) -> None:
    assert get_task("logiqa").read_row(row) == EXPECTED


def test_steps_of_ones_own_are_read() -> None:
    row = {"context": "c", "question": "q", "options": OPTIONS, "answer": "A", "steps": ["First.", "Second."]}
    assert get_task("logiqa").read_row(row).steps == ("First.", "Second.")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["A.One", "C.Three", "B.Two", "D.Four"], ["One", "Two", "Three", "Four"]),
        (["A? One", "b) Two", "(C) Three", "D: Four"], ["One", "Two", "Three", "Four"]),
        (["A One", "B Two", "C Three", "D Four"], ["One", "Two", "Three", "Four"]),
        (["A.One", "In the B.Two", "C.Three", "D.Four"], ["One", "In the B.Two", "Three", "Four"]),
        (["A man", "Two", "Three", "Four"], ["A man", "Two", "Three", "Four"]),
        (["D.One", "Two", "Three", "Four"], ["D.One", "Two", "Three", "Four"]),
    ],
)
def test_letters_that_options_carry_count_where_all_four_do(options: list[str], expected: list[str]) -> None:
    row = {"context": "c", "question": "q", "options": options, "answer": "A"}
    question = get_task("logiqa").read_row(row).question
    assert question == "\n".join(["c", "q", *(f"{letter}. {text}" for letter, text in zip("ABCD", expected))])  # noqa: B905


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "\n".join(LINES[:7])}, "must be eight lines: an empty one, .* got 7 starting with"),
        ({"text": "\n".join([*LINES[1:], ""])}, "must be eight lines"),
        ({"text": "\n".join(["", "e", *LINES[2:]])}, "answer: must be a letter A to D or an index 0 to 3, got 'e'"),
        ({"text": "{"}, "not valid JSON"),
        ({"question": "q"}, "context or text: the row has no such field; its fields: question"),
        ({"context": "c", "options": OPTIONS}, "question or query: the row has no such field"),
        ({"context": "c", "query": "q"}, "options: the row has no such field"),
        ({"context": "c", "query": "q", "options": OPTIONS[:3], "answer": 0}, "options: must be 4 texts, got"),
        ({"context": "c", "query": "q", "options": OPTIONS}, "answer or correct_option or label: the row has no such"),
        ({"context": "c", "query": "q", "options": OPTIONS, "answer": 4}, "answer: must be a letter A to D .* got 4"),
        ({"context": "c", "query": "q", "options": OPTIONS, "answer": True}, "answer: must be a letter A to D"),
    ],
)
def test_names_what_is_wrong_with_a_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_task("logiqa").read_row(row)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_is_cut_into_problems_and_a_cut_one_is_a_bad_row(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "Eval.txt").write_text("\n".join([*LINES, *LINES, *LINES[:4]]) + "\n\n")
    rows = list(get_task("logiqa").load("validation", path=str(tmp_path), streaming=streaming))
    assert [row["question"] for row in rows] == [QUESTION, QUESTION, None]
    assert rows[2]["row_error"].startswith("Eval.txt lines 17 to 21: must be eight lines")


def test_a_wrong_letter_or_none_is_wrong() -> None:
    task = get_task("logiqa")
    assert [task.is_correct(text, "C") for text in ("C", "(C)", "B", "It is C")] == [True, True, False, False]
