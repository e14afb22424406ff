"""ProntoQA and BIG-Bench Hard: rows written by hand in the published forms.

The forms are those of ``preprocessing/prontoqa.py`` in https://github.com/facebookresearch/coconut, which reads what
``run_experiment.py --model-name json`` of https://github.com/asaparov/prontoqa writes, and of the files in
https://github.com/suzgunmirac/BIG-Bench-Hard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from rim_peft.data import sources
from rim_peft.data.examples import Example, RowError
from rim_peft.tasks import get_task
from rim_peft.tasks.answers import RULES
from rim_peft.tasks.logic import BIG_BENCH_HARD

GENERATED = {
    "question": "Each yumpus is a lorpus. Lorpuses are not slow. Stella is a yumpus.",
    "query": "True or false: Stella is slow.",
    "chain_of_thought": [
        "Stella is a yumpus.",
        "Each yumpus is a lorpus.",
        "Stella is a lorpus.",
        "Lorpuses are not slow.",
        "Stella is not slow.",
    ],
    "answer": "False",
}
PREPARED = {
    "question": f"{GENERATED['question']} {GENERATED['query']}",
    "steps": [
        "Stella is a yumpus. Each yumpus is a lorpus.",
        "Stella is a lorpus. Lorpuses are not slow.",
        "Stella is not slow.",
    ],
    "answer": "False",
}


def test_prontoqas_files_of_both_kinds_give_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "5hop_0shot_random.json"
    path.write_text(json.dumps({f"example{n}": {"test_example": GENERATED} for n in (1, 2)}))
    (tmp_path / "prontoqa_test.json").write_text(json.dumps([PREPARED]))
    task = get_task("prontoqa")
    prepared = task.load("test", path=str(tmp_path))
    generated = [*task.load("train", path=str(path)), *task.load("validation", path=str(path))]
    assert prepared[0] == {**PREPARED, "row_error": None}
    assert generated == [prepared[0]] * 2


def test_prontoqas_answers_are_compared_as_texts_and_as_words() -> None:
    task = get_task("prontoqa")
    assert task.judge("False.", "False") == {"exact-text": True, "yes-no": True}
    assert task.judge("false", "False") == {"exact-text": False, "yes-no": True}
    assert task.judge("True", "False") == {"exact-text": False, "yes-no": False}
    assert get_task("prontoqa", answer_rule="yes-no").is_correct("false", "False")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PREPARED, "answer": "Stella is slow."}, "answer: must be True or False, got 'Stella is slow.'"),
        ({"test_example": [GENERATED]}, "test_example: must be an object, got"),
        ({"test_example": {**GENERATED, "query": ""}}, "query: must be a text that is not empty"),
        ({"test_example": {**GENERATED, "chain_of_thought": 5}}, "chain_of_thought: must be a text or a list of texts"),
    ],
)
def test_names_what_is_wrong_with_a_row_of_prontoqa(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_task("prontoqa").read_row(row)


def test_a_name_given_twice_does_not_lose_a_row(tmp_path: Path) -> None:
    row = json.dumps({"test_example": GENERATED})
    (tmp_path / "test.json").write_text(f'{{"example1": {row}, "example1": {row}}}')
    rows = get_task("prontoqa").load("test", path=str(tmp_path))
    assert "an object has the key 'example1' twice" in rows[0]["row_error"]


@pytest.mark.parametrize(
    ("subtask", "asked", "target", "right", "wrong"),
    [
        ("boolean_expressions", "not ( True ) and ( True ) is", "False", "false", "True"),
        ("dyck_languages", "Complete the rest of the sequence. Input: < [ [", "] ] >", " ] ] >\n", "] > ]"),
        ("multistep_arithmetic_two", "((-1 + 2) - (-2 + -4)) =", "-7", "-7.0", "7"),
        ("navigate", "Do you return?\nOptions:\n- Yes\n- No", "No", "no.", "Yes"),
        ("tracking_shuffled_objects_seven_objects", "Bob has\nOptions:\n(A) x\n(G) y", "(G)", "G", "(A)"),
        ("word_sorting", "Sort the following words alphabetically: List: b a", "a b", "a b.", "b a"),
    ],
)
def test_bbhs_rule_depends_on_its_task(subtask: str, asked: str, target: str, right: str, wrong: str) -> None:
    task = get_task("bbh", subtask=subtask)
    assert task.read_row({"input": asked, "target": target}) == Example(asked, answer=target)
    assert task.judge(right, target) == {BIG_BENCH_HARD[subtask]: True}
    assert task.judge(wrong, target) == {BIG_BENCH_HARD[subtask]: False}


def test_all_rows_of_bbh_are_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "navigate.json"
    examples = [{"input": f"{n}?", "target": "Yes"} for n in range(3)]
    path.write_text(json.dumps({"canary": "DATA SHOULD NEVER ...", "examples": examples}))
    task = get_task("bbh", subtask="navigate")
    assert task.load("test", path=str(path))["question"][:] == ["0?", "1?", "2?"]
    with pytest.raises(ValueError, match=r"split: 'train' of its source is 'test' in task 'bbh'. Use 'test'"):
        task.load("train", path=str(path))
    asked: list[Any] = []
    hub = DatasetDict({"test": Dataset.from_list(examples)})
    monkeypatch.setattr(sources, "load_dataset", lambda *names, **__: asked.append(names) or hub)
    assert len(task.load("test")) == 3
    assert asked == [("SaylorTwift/bbh", "navigate")]


def test_bbhs_tasks_are_named() -> None:
    assert set(BIG_BENCH_HARD.values()) <= {*RULES, "exact-text"}
    with pytest.raises(ValueError, match=r"subtask: must be one of boolean_expressions, .*word_sorting, got 'snarks'"):
        get_task("bbh", subtask="snarks")
