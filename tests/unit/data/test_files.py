import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from rim_peft.data import sources
from rim_peft.data.sources import Rows, find_splits
from tests.unit.data.conftest import WriteRows

ROWS: list[dict[str, Any]] = [
    {"question": "1 + 1?", "steps": ["1+1=2"], "answer": "2"},
    {"question": "ü?", "steps": None, "answer": "18"},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def open_splits(path: str, **options: Any) -> dict[str, Rows]:
    """Open every split that is found."""
    return {name: open_split() for name, open_split in find_splits(path, **options).items()}


def write_json(path: Path, form: str) -> None:
    """Write the rows in one of the forms that JSON files have."""
    text = {
        "list": json.dumps(ROWS),
        "list, many lines": json.dumps(ROWS, indent=2),
        "data": json.dumps({"version": 1, "data": ROWS}),
        "data, many lines": json.dumps({"data": ROWS}, indent=2),
        "lines": "\n".join(LINES) + "\n\n",
        "byte order mark": "\ufeff" + json.dumps(ROWS),
    }[form]
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["list", "list, many lines", "data", "data, many lines", "lines", "byte order mark"])
def test_json_in_every_form_gives_a_json_text_a_row(tmp_path: Path, form: str, streaming: bool) -> None:
    write_json(tmp_path / "train.json", form)
    (rows,) = open_splits(str(tmp_path / "train.json"), streaming=streaming).values()
    assert [list(row) for row in rows] == [["json", "row_place", "row_error"]] * 2
    places = ["line 1", "line 2"] if form == "lines" else ["item 0", "item 1"]
    assert [row["row_place"] for row in rows] == [f"train.json {place}" for place in places]
    assert [json.loads(row["json"]) for row in rows] == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_json_lines_stay_lines(write_rows: WriteRows, streaming: bool) -> None:
    path = write_rows("train.jsonl", ROWS)
    rows = list(open_splits(str(path), streaming=streaming)["train"])
    assert [(row["json"], row["row_error"]) for row in rows] == [(line, None) for line in LINES]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_gives_a_line_a_row(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "test.txt").write_text("a||b\nc||d\n")
    rows = list(open_splits(str(tmp_path), streaming=streaming)["test"])
    assert [(row["text"], row["row_place"]) for row in rows] == [
        ("a||b", "test.txt line 1"),
        ("c||d", "test.txt line 2"),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_has_its_own_columns(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "dev.parquet")
    assert list(open_splits(str(tmp_path), streaming=streaming)["validation"]) == ROWS


def test_streaming_gives_a_stream(write_rows: WriteRows) -> None:
    path = write_rows("train.jsonl", ROWS)
    assert isinstance(open_splits(str(path), streaming=True)["train"], IterableDataset)
    assert isinstance(open_splits(str(path))["train"], Dataset)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("validation.jsonl", "validation"),
        ("valid.jsonl", "validation"),
        ("val.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("Eval.jsonl", "validation"),
        ("ProsQA_Test.jsonl", "test"),
        ("test.jsonl", "test"),
        ("prosqa_valid.jsonl", "validation"),
        ("test-00000-of-00001.jsonl", "test"),
    ],
)
def test_files_are_named_after_splits(write_rows: WriteRows, name: str, split: str) -> None:
    path = write_rows(name, ROWS)
    assert list(open_splits(str(path), prefix="prosqa")) == [split]
    assert list(open_splits(str(path.parent), prefix="prosqa")) == [split]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_text_is_cut_into_rows_of_several_lines(tmp_path: Path, streaming: bool, end: str) -> None:
    (tmp_path / "test.txt").write_text("\na\nb\n\nc\nd\n\ne" + end)
    rows = [row["text"] for row in open_splits(str(tmp_path), streaming=streaming, lines_per_row=3)["test"]]
    assert rows == ["\na\nb", "\nc\nd", "\ne" if len(end) < 2 else "\ne\n"]


def test_other_files_than_text_have_a_row_a_line_all_the_same(write_rows: WriteRows) -> None:
    path = write_rows("train.jsonl", ROWS)
    assert [row["json"] for row in open_splits(str(path), lines_per_row=8)["train"]] == LINES


def test_a_task_has_its_own_names_for_a_sources_splits(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train.jsonl", "dev.jsonl"):
        path = write_rows(name, ROWS)
    assert sorted(open_splits(str(path.parent), names={"dev": "test"})) == ["test", "train"]
    assert list(open_splits(str(path), names={"dev": "test"})) == ["test"]
    assert list(open_splits(str(write_rows("mine.jsonl", ROWS)), names={"train": "test"})) == ["test"]
    splits = DatasetDict({"training": Dataset.from_list(ROWS), "dev": Dataset.from_list(ROWS)})
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: splits)
    assert sorted(open_splits("some/rows", names={"dev": "extra", "train": "test"})) == ["extra", "test"]


def test_two_files_for_a_split_under_the_tasks_names_are_refused(write_rows: WriteRows) -> None:
    write_rows("test.jsonl", ROWS)
    folder = write_rows("dev.jsonl", ROWS).parent
    with pytest.raises(ValueError, match=r"several files for the split 'test': dev\.jsonl, test\.jsonl"):
        open_splits(str(folder), names={"dev": "test"})


def test_a_file_of_another_name_counts_as_train_alone(write_rows: WriteRows) -> None:
    assert list(open_splits(str(write_rows("mine.jsonl", ROWS)))) == ["train"]


def test_a_folders_other_files_are_left_alone(write_rows: WriteRows) -> None:
    for name in ("train.jsonl", "train_socratic.jsonl", "test.jsonl", "notes.md", "other_test.jsonl"):
        write_rows(name, ROWS)
    assert sorted(open_splits(str(write_rows("README.md", []).parent), prefix="gsm8k")) == ["test", "train"]


def test_the_parts_of_a_split_are_one(write_rows: WriteRows) -> None:
    write_rows("train-00000-of-00002.jsonl", ROWS[:1])
    path = write_rows("train-00001-of-00002.jsonl", ROWS[1:])
    assert open_splits(str(path.parent))["train"]["json"][:] == LINES


def test_a_changed_file_is_read_anew(write_rows: WriteRows) -> None:
    assert len(open_splits(str(write_rows("train.jsonl", ROWS)))["train"]) == 2
    assert len(open_splits(str(write_rows("train.jsonl", ROWS * 2)))["train"]) == 4


def test_names_what_was_looked_for_and_what_is_there(write_rows: WriteRows) -> None:
    folder = write_rows("rows.xlsx", ROWS).parent
    with pytest.raises(FileNotFoundError, match=r"path: no file or folder .*absent.jsonl.* holds rows\.xlsx\. Give a"):
        open_splits(str(folder / "absent.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"such as train\.jsonl, .* It holds rows\.xlsx\."):
        open_splits(str(folder))
    with pytest.raises(
        ValueError, match=r"path: must end in one of \.jsonl, \.json, .*\.parquet, \.arrow .*, got .*rows\.xlsx"
    ):
        open_splits(str(folder / "rows.xlsx"))


def test_refuses_two_files_for_a_split(write_rows: WriteRows) -> None:
    write_rows("valid.jsonl", ROWS)
    folder = write_rows("dev.jsonl", ROWS).parent
    with pytest.raises(ValueError, match=r"several files for the split 'validation': dev\.jsonl, valid\.jsonl"):
        open_splits(str(folder))


@pytest.mark.parametrize("name", ["train.json", "train.parquet"])
def test_names_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"question": ')
    with pytest.raises(ValueError, match=rf"path: .*{name}"):
        open_splits(str(tmp_path))


def test_a_damaged_file_does_not_keep_from_the_others(write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("")
    folder = write_rows("test.jsonl", ROWS).parent
    assert len(find_splits(str(folder))["test"]()) == 2


def test_reads_hub_ids_with_and_without_config(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None]] = []

    def load(path: str, config: str | None, **_: Any) -> DatasetDict:
        calls.append((path, config))
        return DatasetDict({"train": Dataset.from_list(ROWS), "valid": Dataset.from_list(ROWS[:1])})

    monkeypatch.setattr(sources, "load_dataset", load)
    splits = open_splits("openai/gsm8k:main")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "validation": 1}
    open_splits("whynlp/gsm8k-aug")
    assert calls == [("openai/gsm8k", "main"), ("whynlp/gsm8k-aug", None)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("Couldn't reach it"), ConnectionError),
        (ValueError("Config name is missing"), FileNotFoundError),
    ],
)
def test_a_failing_hub_is_one_error(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sources, "load_dataset", load)
    monkeypatch.setattr(sources, "hub_problem", lambda: None)
    with pytest.raises(kind, match=rf"path: some/rows is not a local file .* from the Hub: {error}\. Give a local"):
        open_splits("some/rows")


@pytest.mark.parametrize("path", ["../some/rows", "some/rows.jsonl", "a/b/c", "rows", "./rows"])
def test_a_local_path_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="path: no file or folder"):
        open_splits(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows[1]", "[ab]", "a*b", "a?b"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_path_is_no_pattern(tmp_path: Path, name: str, suffix: str, streaming: bool) -> None:
    def write(path: Path, question: str) -> None:
        path.parent.mkdir(exist_ok=True)
        rows = Dataset.from_list([{"question": question}])
        rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path)

    for other in ("rows1", "a", "b", "axb"):
        write(tmp_path / f"{other}{suffix}", "another file")
        write(tmp_path / other / f"train{suffix}", "another folder")
    write(tmp_path / f"{name}{suffix}", "this one")
    write(tmp_path / name / f"train{suffix}", "this one")
    for path in (tmp_path / f"{name}{suffix}", tmp_path / name):
        (row,) = open_splits(str(path), streaming=streaming)["train"]
        assert "this one" in str(row)
