"""CommonsenseQA, ARC and AQuA-RAT: rows written by hand in the published forms.

The forms are those of the dataset cards of ``tau/commonsense_qa``, ``allenai/ai2_arc`` and ``deepmind/aqua_rat`` on the
Hub, and of the authors' files, as in the README of https://github.com/google-deepmind/AQuA and in
https://github.com/Shuailong/csqa (CommonsenseQA). A row of ARC with the labels 1 to 4 is in
https://github.com/allenai/OLMo-Eval (``std_fewshot.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from rim_peft.data import sources
from rim_peft.data.examples import BadRowsError, Example, RowError
from rim_peft.tasks import get_task
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows
from tests.unit.data.conftest import WriteRows

TEXTS = ["a barn", "a lake", "a cloud"]
HUB: dict[str, Any] = {
    "id": "075e",
    "question": "Where do mice live?",
    "question_concept": "mice",
    "choices": {"label": ["A", "B", "C"], "text": TEXTS},
    "answerKey": "B",
}
AUTHORS: dict[str, Any] = {
    "answerKey": "B",
    "id": "075e",
    "question": {
        "question_concept": "mice",
        "choices": [{"label": label, "text": text} for label, text in zip("ABC", TEXTS, strict=True)],
        "stem": "Where do mice live?",
    },
}
EXPECTED = Example("Where do mice live?\nA. a barn\nB. a lake\nC. a cloud", answer="B")
AQUA = {
    "question": "A shop sells ice for $2 a bag. What do 5 bags cost?",
    "options": ["A)$7", "B)$9", "C)$10", "D)$12", "E)None of these"],
    "rationale": "Price of a bag = 2\n\nTotal = 5 * 2 = 10\nAnswer is C.",
    "correct": "C",
}


@pytest.mark.parametrize("task", ["commonsenseqa", "arc-easy", "arc-challenge"])
def test_both_forms_give_the_same_example(task: str) -> None:
    assert get_task(task).read_row(HUB) == get_task(task).read_row(AUTHORS) == EXPECTED


def test_labels_of_any_kind_become_letters_in_order() -> None:
    row = {**HUB, "choices": {"label": ["1", "2", "3"], "text": TEXTS}, "answerKey": "2"}
    assert get_task("arc-easy").read_row(row) == EXPECTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": ""}, "answerKey: must be one of the labels A, B, C, got ''"),
        ({"answerKey": "D"}, "answerKey: must be one of the labels A, B, C, got 'D'"),
        (
            {"choices": {"label": ["A", "A"], "text": ["x", "y"]}, "answerKey": "A"},
            "choices: must be 2 to 7 texts with",
        ),
        ({"choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}, "choices: must be 2 to 7 texts"),
        ({"choices": {"label": ["A", "B"], "text": ["x"]}, "answerKey": "A"}, "choices: must be 2 to 7 texts"),
        ({"choices": ["x", "y"]}, "choices: must be 2 to 7 texts with different labels, got"),
        ({"question": 5}, "question: must be a text, or an object with stem and choices, got 5"),
    ],
)
def test_names_what_is_wrong_with_a_row(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_task("commonsenseqa").read_row({**HUB, **change})


def test_a_row_without_an_answer_is_a_bad_one() -> None:
    with pytest.raises(RowError, match="answerKey: the row has no such field"):
        get_task("commonsenseqa").read_row({name: value for name, value in AUTHORS.items() if name != "answerKey"})


def _published(first: int, count: int, *, key: str = "B") -> list[dict[str, Any]]:
    return [{**HUB, "question": f"Where is mouse {n}?", "answerKey": key} for n in range(first, first + count)]


def test_commonsenseqa_reports_on_the_published_validation_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": _published(0, 90), "validation": _published(90, 5), "test": _published(95, 5, key="")}
    hub = DatasetDict({name: Dataset.from_list(some) for name, some in rows.items()})
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: hub)
    task = get_task("commonsenseqa")
    train, validation, test = (task.load(split) for split in ("train", task.selection_split, "test"))
    assert [row["question"].split("\n")[0] for row in test] == [f"Where is mouse {n}?" for n in range(90, 95)]
    assert len(train) + len(validation) == 90
    assert validation.num_rows
    assert not set(train["question"]) & set(validation["question"])
    assert all("answerKey: must be one of" in row["row_error"] for row in task.load("unanswered"))
    with pytest.raises(ValueError, match=r"split: 'dev' of its source is 'test' in task 'commonsenseqa'. Use 'test'"):
        task.load("dev")


def test_commonsenseqas_files_have_the_same_splits(tmp_path: Path) -> None:
    for name, first, count in (("train", 0, 90), ("dev", 90, 5), ("test", 95, 5)):
        rows = [{**AUTHORS, "question": {**AUTHORS["question"], "stem": f"{n}?"}} for n in range(first, first + count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = get_task("commonsenseqa").load("test", path=str(tmp_path))
    assert [row["question"].split("\n")[0] for row in loaded] == [f"{n}?" for n in range(90, 95)]


def test_aqua_rats_rationale_is_the_steps_without_the_letter() -> None:
    read = get_task("aqua-rat").read_row
    expected = Example(
        "A shop sells ice for $2 a bag. What do 5 bags cost?\nA. $7\nB. $9\nC. $10\nD. $12\nE. None of these",
        answer="C",
        steps=("Price of a bag = 2", "Total = 5 * 2 = 10"),
    )
    assert read(AQUA) == expected
    assert read({**AQUA, "rationale": "Total = 5 * 2 = 10. Answer C"}).steps == ("Total = 5 * 2 = 10. Answer C",)
    assert read({**AQUA, "rationale": "The correct answer is (C)."}).steps is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": "F"}, "correct: must be a letter A to E, got 'F'"),
        ({"options": AQUA["options"][:4]}, "options: must be 5 texts, got"),
        ({"rationale": ""}, "rationale: must be a text that is not empty"),
    ],
)
def test_names_what_is_wrong_with_a_row_of_aqua_rat(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_task("aqua-rat").read_row({**AQUA, **change})


def test_aqua_rats_files_are_lines_despite_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text("\n".join(json.dumps({**AQUA, "correct": letter}) for letter in "AB") + "\n")
    rows = get_task("aqua-rat").load("validation", path=str(tmp_path))
    assert rows["answer"][:] == ["A", "B"]
    assert all(all(get_task("aqua-rat").judge(f"({answer})", answer).values()) for answer in rows["answer"])


@pytest.mark.parametrize("task", ["commonsenseqa", "arc-easy"])
def test_rows_without_a_chain_serve_stage_2_alone(task: str, write_rows: WriteRows) -> None:
    rows = get_task(task).load("train", path=str(write_rows("train.jsonl", _published(0, 30))))
    options: dict[str, Any] = {"num_blocks": 2, "block_length": 4}
    assert len(list(prepare_rows(rows, build_tokenizer(), needs_steps=False, **options))) == len(rows)
    with pytest.raises(BadRowsError, match="row 0: steps: there are none, and this training needs at least one"):
        list(prepare_rows(rows, build_tokenizer(), needs_steps=True, **options))
