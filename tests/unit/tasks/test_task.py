import ast
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset, IterableDataset

from rim_peft.data.examples import BadRowsError, Example
from rim_peft.tasks import TASKS, Task, get_task
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows
from tests.unit.data.conftest import WriteRows

ROWS: list[dict[str, Any]] = [{"question": f"{n} + 1?", "steps": [f"{n}+1"], "answer": str(n + 1)} for n in range(300)]


@dataclass(frozen=True)
class Plain(Task):
    """A task that changes nothing."""

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Renamed(Task):
    """A user's task: other fields, and an option."""

    name: ClassVar[str] = "renamed"
    ending: str = ""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        return Example(row["ask"] + self.ending, answer=row["say"])


def as_rows(dataset: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """The good rows, without the column for errors."""
    return [{name: row[name] for name in ("question", "steps", "answer")} for row in dataset if not row["row_error"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_loads_a_split_from_a_file_and_from_its_folder(tmp_path: Path, suffix: str, streaming: bool) -> None:
    rows = [*ROWS[:3], {"question": "why?", "steps": None, "answer": "so"}]
    path = tmp_path / f"test.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(row) for row in rows))
    for place in (path, tmp_path):
        assert as_rows(Plain().load("test", path=str(place), streaming=streaming)) == rows


def test_texts_that_look_like_numbers_or_dates_stay_texts(tmp_path: Path) -> None:
    rows = [
        {"question": "when?", "steps": ["1.50"], "answer": answer} for answer in ("2020-01-02", "007", "1e3", "null")
    ]
    for name, text in (("train.json", json.dumps({"data": rows})), ("train.jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(text)
        loaded = Plain().load("train", path=str(tmp_path / name)), Plain().load("validation", path=str(tmp_path / name))
        assert sorted(row["answer"] for part in loaded for row in as_rows(part)) == sorted(r["answer"] for r in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_is_carved_out_of_train_where_there_is_none(write_rows: WriteRows, streaming: bool) -> None:
    path = str(write_rows("train.jsonl", ROWS))
    train, validation = (as_rows(Plain().load(split, path=path, streaming=streaming)) for split in ("train", "valid"))
    assert len(validation) == 15  # of 300, where 20 are expected
    assert sorted(train + validation, key=lambda row: int(row["answer"])) == ROWS
    assert as_rows(Plain().load("train", path=path, streaming=streaming, whole=True)) == ROWS


def test_the_carved_out_questions_do_not_depend_on_the_other_rows(write_rows: WriteRows) -> None:
    path = str(write_rows("train.jsonl", ROWS))
    all_rows = as_rows(Plain().load("validation", path=path))
    write_rows("train.jsonl", ROWS[:100][::-1])
    few_rows = as_rows(Plain().load("validation", path=path))
    assert few_rows[::-1] == [row for row in all_rows if row in ROWS[:100]]
    assert few_rows


def test_a_validation_file_is_used_and_leaves_train_whole(write_rows: WriteRows) -> None:
    write_rows("train.jsonl", ROWS)
    folder = str(write_rows("dev.jsonl", ROWS[:5]).parent)
    assert as_rows(Plain().load("train", path=folder)) == ROWS
    assert as_rows(Plain().load("validation", path=folder)) == ROWS[:5]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_test_rows_serve_as_nothing_else(write_rows: WriteRows, split: str) -> None:
    path = write_rows("test.jsonl", ROWS)
    for place in (path, path.parent):
        with pytest.raises(FileNotFoundError, match=rf"split: .* has no split '{split}' for task 'plain', only test\."):
            Plain().load(split, path=str(place))


def test_a_file_of_another_name_is_no_test_split(write_rows: WriteRows) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no split 'test' .*, only train.*a file not named after a split counts"
    ):
        Plain().load("test", path=str(write_rows("mine.jsonl", ROWS)))


def test_needs_a_path_without_a_source_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"path: task 'plain' has no default source. Give a file"):
        Plain().load("train")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.txt"])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    for content in ("", "[]" if name == "train.json" else "\n"):
        (tmp_path / name).write_text(content)
        with pytest.raises(
            ValueError, match=r"path: .*must hold rows .*got none|path: .*must hold rows, got an empty file"
        ):
            Plain().load("train", path=str(tmp_path))


BAD_LINES = ['{"question": "q", "answer": ', "[1, 2]", '{"question": "q"}', '{"question": 3, "answer": "a"}']


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_keep_their_place_and_say_why(tmp_path: Path, streaming: bool) -> None:
    good = json.dumps(ROWS[0])
    (tmp_path / "test.jsonl").write_text("\n".join([good, *BAD_LINES, "", good]))
    errors = [row["row_error"] for row in Plain().load("test", path=str(tmp_path), streaming=streaming)]
    assert errors[0] is errors[5] is None
    assert len(errors) == 6  # the blank line is no row
    assert errors[1].startswith("test.jsonl line 2: not valid JSON: it breaks off at character 28")
    assert errors[2] == "test.jsonl line 3: must be a JSON object with fields, got '[1, 2]'"
    assert errors[3] == "test.jsonl line 4: answer: the row has no such field; its fields: question"
    assert errors[4] == "test.jsonl line 5: question: must be a text or a list of chat messages, got 3 (int)"


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_reported_when_they_are_prepared(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join([json.dumps(ROWS[0]), "{", json.dumps(ROWS[1])]))
    rows = Plain().load("test", path=str(tmp_path), streaming=streaming)
    options: dict[str, Any] = {"needs_steps": True, "num_blocks": 0, "block_length": 4}
    with pytest.raises(BadRowsError, match=r"row 1: test\.jsonl line 2: not valid JSON"):
        list(prepare_rows(rows, build_tokenizer(), **options))
    assert len(list(prepare_rows(rows, build_tokenizer(), **options, on_bad_rows="drop"))) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_loads_chats(write_rows: WriteRows, streaming: bool) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows: list[dict[str, Any]] = [{"question": chat, "answer": "a"}, {"question": "a text", "answer": "a"}]
    loaded = list(Plain().load("test", path=str(write_rows("test.jsonl", rows)), streaming=streaming))
    assert loaded[0]["question"] == chat
    assert loaded[1]["row_error"] == "test.jsonl line 2: question: must be chat messages as in the first row"


def test_loads_from_the_hub_form(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([{**ROWS[0], "id": 3}])
    monkeypatch.setattr("rim_peft.tasks.task.find_splits", lambda path, **_: {"test": lambda: rows})
    assert as_rows(Plain().load("test", path="some/rows")) == ROWS[:1]


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Tom is a lempus.", "Tom is a lempus.", True),
        (" Tom is a lempus\n", "Tom is a lempus.", True),
        ("Tom is a lempus..", "Tom is a lempus.", False),
        ("Tom is a Lempus.", "Tom is a lempus.", False),
        ("Tom is a scrompus.", "Tom is a lempus.", False),
        ("", "Tom is a lempus.", False),
        (".", "Tom is a lempus.", False),
    ],
)
def test_answers_are_compared_as_exact_texts(text: str, gold: str, expected: bool) -> None:
    assert get_task("prosqa").is_correct(text, gold) is expected
    assert get_task("prosqa").answer_rule == "exact-text"


def test_a_gold_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gold: must give an answer under exact-text, got '\.'\. Correct the row"):
        get_task("prosqa").is_correct(".", ".")


def test_prosqa_reads_its_files_and_nothing_of_the_graph(write_rows: WriteRows) -> None:
    row = {"question": "Is Tom a lempus or scrompus?", "steps": ["Tom is a terpus."], "answer": "Tom is a lempus."}
    path = write_rows("prosqa_valid.jsonl", [{**row, "edges": [[0, 1]], "root": 4}])
    assert as_rows(get_task("prosqa").load("validation", path=str(path.parent))) == [row]


def test_a_task_of_ones_own_by_module_and_class(write_rows: WriteRows) -> None:
    task = get_task("tests.unit.tasks.test_task:Renamed", ending="?")
    path = write_rows("test.jsonl", [{"ask": "1 + 1", "say": "2"}])
    assert as_rows(task.load("test", path=str(path))) == [{"question": "1 + 1?", "steps": None, "answer": "2"}]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "gsm8",
            {},
            "task: no task 'gsm8', did you mean 'gsm8k'. Choose one of aqua-rat, .*svamp, reasoning-gym:NAME .*or",
        ),
        ("sudoku", {}, "task: no task 'sudoku'. Choose one of"),
        (
            "gsm8k",
            {"step": "x"},
            "step: no option of task 'gsm8k', did you mean 'steps'. Its options: steps, answer_rule",
        ),
        ("gsm8k", {"name": "x"}, "name: no option of task 'gsm8k'"),
        ("prosqa", {"steps": "x"}, "steps: no option of task 'prosqa'. Its options: none"),
        ("gsm8k", {"steps": "words"}, "steps: must be one of 'equations', 'sentences' in task 'gsm8k', got 'words'"),
        ("no_such_module:Task", {}, "task: 'no_such_module:Task' cannot be imported: No module named 'no_such_module'"),
        ("json:Absent", {}, "task: 'json:Absent' cannot be imported: module 'json' has no attribute 'Absent'"),
        ("json:JSONDecoder", {}, "task: 'json:JSONDecoder' must be a dataclass that extends .*Task"),
    ],
)
def test_names_what_it_knows(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task(name, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_generated_task_makes_its_rows(streaming: bool) -> None:
    task = get_task("potions", lengths=[2], num_held_out=3)
    rows = list(task.load("valid", streaming=streaming))
    assert len(rows) == 3
    assert rows == list(task.load("validation"))
    assert all(len(row["steps"]) == 2 and task.is_correct(f"{row['answer']}.", row["answer"]) for row in rows)


def test_a_generated_task_has_no_path() -> None:
    with pytest.raises(ValueError, match=r"path: task 'potions' generates its rows, got 'x'. Omit it"):
        get_task("potions").load("train", path="x")


@dataclass(frozen=True)
class OldWay(Task):
    """A user's task with a rule of its own name and two overrides, and no list of rules."""

    name: ClassVar[str] = "old-way"
    answer_rule = "first-word"

    def read_answer(self, text: str) -> str | None:
        return next(iter(text.split()), None)


@dataclass(frozen=True)
class TwoRules(Task):
    """A user's task with a shared rule and one of its own."""

    name: ClassVar[str] = "two-rules"
    answer_rules: ClassVar[tuple[str, ...]] = ("yes-no", "shouted")
    answer_rule: str = "yes-no"

    def is_correct(self, text: str, gold: str) -> bool:
        return text == gold.upper() if self.answer_rule == "shouted" else super().is_correct(text, gold)


def test_a_task_without_rules_compares_texts() -> None:
    assert Plain().answer_rules == ("exact-text",)
    assert Plain().judge("so.", "so") == {"exact-text": True}


def test_a_rule_of_ones_own_name_reads_answer_and_gold_alike() -> None:
    assert OldWay().answer_rules == ("first-word",)
    assert OldWay().judge("so it is", "so be it") == {"first-word": True}
    assert OldWay().judge("", "so") == {"first-word": False}


@pytest.mark.parametrize("deciding", ["yes-no", "shouted"])
def test_every_rule_judges_whichever_decides(deciding: str) -> None:
    task = TwoRules(answer_rule=deciding)
    assert list(task.judge("YES", "yes").items()) == [("yes-no", True), ("shouted", True)]
    assert task.judge("it is true", "yes") == {"yes-no": True, "shouted": False}
    assert task.is_correct("it is true", "yes") is (deciding == "yes-no")
    assert task.answer_rule == deciding


def test_a_rule_that_the_task_does_not_report_cannot_decide() -> None:
    with pytest.raises(
        ValueError, match="answer_rule: must be one of 'yes-no', 'shouted' in task 'two-rules', got 'x'"
    ):
        TwoRules(answer_rule="x")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_that_comes_along_reports_its_deciding_rule_first_and_selects_elsewhere(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    assert task.answer_rules[0] == task.answer_rule
    assert task.selection_split == "validation"
    for text, gold in (("", "yes A 1"), ("A 18 yes red", "1")):
        try:
            verdicts = task.judge(text, gold)
        except ValueError:  # no gold of this task
            continue
        assert tuple(verdicts) == task.answer_rules
        assert task.is_correct(text, gold) is verdicts[task.answer_rule]


@pytest.mark.parametrize("name", ["rows", "gsm8k", "math", "prosqa", "logiqa"])
def test_rows_on_disk_are_those_of_all_the_code_that_reads_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: set[str] = set()
    monkeypatch.setattr("rim_peft.tasks.task.source_hash", lambda *modules: hashed.update(modules) or "hash")
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    task = get_task(name)
    task.load("train", path=str(path))
    own = {type(task).__module__, "rim_peft.tasks.task"}
    trees = [ast.parse(inspect.getsource(sys.modules[module])) for module in own]
    imported = {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert own | {module for module in imported if module and module.startswith("rim_peft.tasks.")} <= hashed
