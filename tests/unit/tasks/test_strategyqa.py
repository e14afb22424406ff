"""StrategyQA: rows written by hand in the published forms, and which file is which split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rim_peft.data import sources as files
from rim_peft.data.examples import Example, RowError
from rim_peft.tasks import get_task

ROW: dict[str, Any] = {
    "qid": "e0",
    "question": "Is it so?",
    "answer": False,
    "facts": ["A has 75,000 people", "B has almost 100,000 people"],
    "decomposition": ["How many has A?", "Is #1 so?"],
}


def test_steps_are_facts_or_the_decomposition() -> None:
    assert get_task("strategyqa").read_row(ROW) == Example("Is it so?", answer="no", steps=tuple(ROW["facts"]))
    decomposed = get_task("strategyqa", steps="decomposition").read_row({**ROW, "answer": True})
    assert decomposed == Example("Is it so?", answer="yes", steps=("How many has A?", "Is #1 so?"))


def test_reads_the_hubs_form_whose_facts_are_one_text() -> None:
    row = {"question": "Is it so?", "answer": True, "facts": "A is big. B is small."}
    assert get_task("strategyqa").read_row(row).steps == ("A is big.", "B is small.")
    assert get_task("strategyqa").read_row({"question": "Is it so?", "answer": True}).steps is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": True}, "question: the row has no such field; its fields: answer"),
        ({"question": "q"}, "answer: the row has no such field; its fields: question"),
        ({"question": "q", "answer": "yes"}, "answer: must be true or false, got 'yes'"),
        ({"question": "q", "answer": None}, "answer: must be true or false, got None"),
        (
            {"question": "q", "answer": True, "decomposition": ["d"]},
            "facts: the row has no such field; its fields: question, answer, decomposition. Set the option steps",
        ),
    ],
)
def test_names_what_is_wrong_with_a_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_task("strategyqa").read_row(row)


def write_files(folder: Path) -> None:
    """Write the authors' two files, small."""
    for name, first, count in (("train", 0, 90), ("dev", 90, 5)):
        rows = [{**ROW, "question": f"Is it {n}?"} for n in range(first, first + count)]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def test_dev_is_the_test_split_and_selection_never_sees_it(tmp_path: Path) -> None:
    write_files(tmp_path)
    task = get_task("strategyqa")
    train, validation, test = (
        set(task.load(split, path=str(tmp_path))["question"]) for split in ("train", task.selection_split, "test")
    )
    assert test == {f"Is it {n}?" for n in range(90, 95)}
    assert train | validation == {f"Is it {n}?" for n in range(90)}
    assert validation
    assert not train & validation
    assert set(task.load("test", path=str(tmp_path / "dev.json"))["question"]) == test


def test_who_asks_for_dev_is_told_what_it_is(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(ValueError, match=r"split: 'dev' of its source is 'test' in task 'strategyqa'. Use 'test'"):
        get_task("strategyqa").load("dev", path=str(tmp_path))


def test_a_split_dev_of_the_hub_is_the_test_too(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {name: Dataset.from_list([{**ROW, "question": f"{name}?"}]) for name in ("train", "dev")}
    monkeypatch.setattr(files, "load_dataset", lambda *_, **__: splits)
    assert get_task("strategyqa").load("test")["question"][:] == ["dev?"]
