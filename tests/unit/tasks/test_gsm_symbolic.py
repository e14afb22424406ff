"""GSM-Symbolic's generated problems: chains without holes, and templates that no training sees."""

from __future__ import annotations

from typing import Any

import pytest

from rim_peft.tasks import get_task
from rim_peft.tasks import gsm_symbolic as module
from rim_peft.tasks.gsm_symbolic import NEW_TEMPLATES, read_steps
from rim_peft.tasks.stories import SPLITS

pytest.importorskip("reasoning_gym")

OPTIONS = {"num_rows": 300, "num_held_out": 60}


def problem(solution: str, *, question: str = "", answer: str = "12") -> dict[str, Any]:
    return {"question": question, "answer": answer, "metadata": {"answer_cot": solution}}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    task: Any = get_task("gsm-symbolic", **OPTIONS)
    return {split: list(task.rows(split)) for split in (*SPLITS, NEW_TEMPLATES)}


def test_equations_are_true_and_end_in_the_answer(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in rows["train"]:
        assert row["length"] == len(row["steps"]) <= 4
        for step in row["steps"]:
            left, _, right = step.partition("=")
            assert module._value(left) == pytest.approx(module._value(right))
        assert module._value(row["steps"][-1].partition("=")[2]) == float(row["answer"])
        assert "final answer" not in row["question"]
    assert {row["length"] for row in rows["train"]} == {1, 2, 3, 4}


def test_splits_share_no_question_and_new_templates_are_new(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert [len(rows[split]) for split in rows] == [300, 60, 60, 60]
    questions = [{row["question"] for row in some} for some in rows.values()]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 480
    new = {row["template"] for row in rows[NEW_TEMPLATES]}
    assert len(new) > 5
    assert not new & {row["template"] for split in SPLITS for row in rows[split]}


def test_the_same_options_give_the_same_rows() -> None:
    first, second, other = (
        list(get_task("gsm-symbolic", num_rows=20, seed=seed).rows("train"))  # type: ignore[attr-defined]
        for seed in (0, 0, 1)
    )
    assert first == second != other


@pytest.mark.parametrize(
    ("solution", "question", "expected"),
    [
        ("He has 2 x 3 = $6.\nThen 6 × 2 = 12 apples\n#### 12", "", ["2*3=6", "6*2=12"]),
        ("50% of it: 48/2=24, and 25%*48=12\n#### 12", "25% of 48", ["48/2=24", "25%*48=12"]),
        ("1,000-988=12\n#### 12", "Of 988", ["1000-988=12"]),
        ("He has twelve\n#### 12", "", "no equation"),
        ("2*3=7, 7+5=12\n#### 12", "", "an equation that is not true"),
        ("2*3=6\n#### 12", "", "the last equation does not give the answer"),
        ("31-19=12\n#### 12", "Of 31", "a number that comes from nowhere"),
    ],
)
def test_what_is_read_of_a_solution(solution: str, question: str, expected: Any) -> None:
    assert read_steps(problem(solution, question=question), wants_equations=True) == expected


def test_bad_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"lengths": [0]}, r"lengths: must hold numbers of equations of at least 1, got \(0,\)"),
        ({"num_new_templates": 41}, "num_new_templates: must be from 0 to 40, got 41"),
        ({"steps": "words"}, "steps: must be one of 'equations', 'sentences' in task 'gsm-symbolic', got 'words'"),
    ):
        with pytest.raises(ValueError, match=message):
            get_task("gsm-symbolic", **options)
    with pytest.raises(ValueError, match="split: must be one of train, validation, test, new-templates, got 'dev2'"):
        get_task("gsm-symbolic").load("dev2")
    monkeypatch.setattr(module, "_MOST_EMPTY_CHUNKS", 1)
    with pytest.raises(ValueError, match=r"split 'train' has 0 problems of \(40,\) equations, got 1000"):
        get_task("gsm-symbolic", lengths=[40]).load("train")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs reasoning-gym: pip install 'rim-peft\[gsm-symbolic\]'"):
        get_task("gsm-symbolic")
