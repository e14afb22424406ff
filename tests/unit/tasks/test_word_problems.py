"""GSM-Hard, SVAMP and MultiArith: rows written by hand in the published forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rim_peft.data import sources as files
from rim_peft.data.examples import Example, RowError
from rim_peft.tasks import get_task
from tests.unit.data.conftest import WriteRows

SVAMP_ROW = {
    "ID": "chal-1",
    "Body": "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack",
    "Question": "How much do you have to pay to buy each pack?",
    "Equation": "( 76.0 - 25.0 )",
    "Answer": "51.0",
    "Type": "Subtraction",
}
SVAMP_QUESTION = (
    "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack. How much do you have to "
    "pay to buy each pack?"
)


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("gsm-hard", {"input": "q", "code": "def", "target": -9867630.0}, Example("q", answer="-9867630")),
        ("gsm-hard", {"input": "q", "target": 2.0107e-06}, Example("q", answer="0.0000020107")),
        ("svamp", SVAMP_ROW, Example(SVAMP_QUESTION, answer="51", steps=("76-25=51",))),
        ("svamp", {"input": SVAMP_QUESTION, "target": 51.0}, Example(SVAMP_QUESTION, answer="51")),
        (
            "svamp",
            {**SVAMP_ROW, "Body": "He ran.", "Equation": "( ( 10.0 + 2.5 ) * 40.0 )", "Answer": 500.0},
            Example(f"He ran. {SVAMP_ROW['Question']}", answer="500", steps=("((10+2.5)*40)=500",)),
        ),
        ("multiarith", {"question": " q ", "final_ans": "12"}, Example("q", answer="12")),
        ("multiarith", {"input": "q", "target": 12.0}, Example("q", answer="12")),
    ],
)
def test_reads_the_published_forms(task: str, row: dict[str, Any], expected: Example) -> None:
    assert get_task(task).read_row(row) == expected


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm-hard", {"question": "q"}, "input: the row has no such field; its fields: question"),
        ("gsm-hard", {"input": "q"}, "target: the row has no such field; its fields: input"),
        ("svamp", {"Body": "b", "Answer": "1"}, "Question: the row has no such field"),
        ("svamp", {"Body": "b", "Question": "q"}, "Answer: the row has no such field"),
        ("svamp", {"Body": "b", "Question": "q", "Answer": "many"}, "Answer: must be a number, got 'many'"),
        ("multiarith", {"question": "q"}, "final_ans or target: the row has no such field"),
    ],
)
def test_names_what_is_wrong_with_a_row(task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_task(task).read_row(row)


def test_every_rule_judges_a_hard_answer() -> None:
    task = get_task("gsm-hard")
    assert task.judge("20.1234", "20.1238") == {"last-number-float": False, "strict-string": False, "abs-1e-3": True}
    assert task.judge("-5.0", "-5") == {"last-number-float": True, "strict-string": False, "abs-1e-3": True}
    assert not task.is_correct("20.1234", "20.1238")
    assert get_task("gsm-hard", answer_rule="abs-1e-3").is_correct("20.1234", "20.1238")


def test_all_rows_of_gsm_hard_are_for_the_test(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input": f"{n}?", "target": float(n)} for n in range(3)]
    task, path = get_task("gsm-hard"), write_rows("gsmhardv2.jsonl", rows)
    assert task.load("test", path=str(path))["answer"][:] == ["0", "1", "2"]
    monkeypatch.setattr(files, "load_dataset", lambda *_, **__: {"train": Dataset.from_list(rows)})
    assert len(task.load("test")) == 3
    with pytest.raises(ValueError, match=r"split: 'train' of its source is 'test' in task 'gsm-hard'. Use 'test'"):
        task.load("train")
    with pytest.raises(FileNotFoundError, match="has no split 'validation' for task 'gsm-hard', only test"):
        task.load("validation")


def test_a_file_named_test_is_one(write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows("test.jsonl", [{"input": "q", "target": 12.0}])
    for task in ("svamp", "multiarith"):
        assert get_task(task).load("test", path=str(tmp_path))["answer"][:] == ["12"]
