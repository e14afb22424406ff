"""The rows of a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.examples import BadRowsError
from rim_peft.recipe import DataOptions
from rim_peft.run.rows import fingerprint, load_rows, read_examples
from rim_peft.tasks import get_task

TASK = get_task("prosqa")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for split, count in (("train", 20), ("valid", 5)):
        rows = [{"question": f"{split} {n}?", "steps": ["a"], "answer": f"{n}"} for n in range(count)]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return str(tmp_path)


def options(folder: str, **changes: Any) -> DataOptions:
    return DataOptions(**{"task": "prosqa", "path": folder, "validation_rows": 3, **changes})


def test_the_first_rows_of_the_validation_split_validate(folder: str) -> None:
    rows = load_rows(options(folder, train_rows=7), TASK)
    assert rows.validation is not None
    assert rows.validation["question"][:] == ["valid 0?", "valid 1?", "valid 2?"]
    assert rows.train["question"][:] == [f"train {n}?" for n in range(7)]


def test_a_small_split_is_used_whole(folder: str) -> None:
    rows = load_rows(options(folder, validation_rows=500, train_rows=500), TASK)
    assert rows.validation is not None
    assert (len(rows.train), len(rows.validation)) == (20, 5)


def test_without_a_split_rows_are_held_out_of_training(folder: str) -> None:
    rows = load_rows(options(folder, validation_split=None), TASK)
    assert rows.validation is not None
    held, kept = set(rows.validation["question"]), set(rows.train["question"])
    assert (len(held), len(kept)) == (3, 17)
    assert not held & kept
    again = load_rows(options(folder, validation_split=None), TASK)
    assert again.validation is not None
    assert set(again.validation["question"]) == held


def test_rows_must_be_left_to_train_on(folder: str) -> None:
    with pytest.raises(ValueError, match=r"data.validation_rows: must leave rows.*'validation' with 5 rows, got 5"):
        load_rows(options(folder, train_split="validation", validation_split=None, validation_rows=5), TASK)


def test_no_validation(folder: str) -> None:
    assert load_rows(options(folder, validation_rows=0), TASK).validation is None


def test_a_stream_is_limited_too(folder: str) -> None:
    rows = load_rows(options(folder, streaming=True, train_rows=4), TASK)
    assert [row["question"] for row in rows.train] == [f"train {n}?" for n in range(4)]


def test_bad_rows_are_listed_or_dropped(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "a?", "answer": "1"}, {"question": "b?"}, {"question": "", "answer": "1"}]
    with pytest.raises(BadRowsError, match=r"row 1: answer: the row has no such field(.|\n)*row 2: question: is empty"):
        read_examples(rows, on_bad_rows="error")
    with caplog.at_level(logging.WARNING):
        (example,) = read_examples(rows, on_bad_rows="drop")
    assert example.question == "a?"
    assert "dropped 2 of 3 rows." in caplog.text


def test_the_fingerprint_is_that_of_the_contents() -> None:
    rows = [{"question": "a", "answer": "ü"}, {"question": "b", "answer": "2"}]
    swapped = [{"answer": "ü", "question": "a"}, rows[1]]
    assert fingerprint(rows) == fingerprint(swapped)
    assert fingerprint(rows)["num_rows"] == 2
    assert fingerprint(rows) != fingerprint(rows[::-1])
