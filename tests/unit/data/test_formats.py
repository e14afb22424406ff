"""Kinds of files: tables of cells, Arrow, folders of ``save_to_disk``, clones of Hub repositories, compressed files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from rim_peft.data.sources import find_splits
from tests.unit.data.test_files import LINES, ROWS, open_splits

TABLE = 'question,answer,note\n"a, ""b""\nc",007,\n\nü,1e3,null\n'
CELLS = [{"question": 'a, "b"\nc', "answer": "007", "note": ""}, {"question": "ü", "answer": "1e3", "note": "null"}]


def compress(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    return path


def parsed(rows: Any) -> list[Mapping[str, Any]]:
    assert all(row["row_error"] is None for row in rows)
    return [json.loads(row["json"]) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["test.csv", "test.tsv", "test.csv.gz", "test.tsv.zst"])
def test_cells_are_texts(tmp_path: Path, name: str, streaming: bool) -> None:
    content = ("\ufeff" + (TABLE.replace(",", "\t") if ".tsv" in name else TABLE)).encode()
    path = tmp_path / name
    if path.suffix in (".gz", ".zst"):
        compress(path, content)
    else:
        path.write_bytes(content)
    rows = list(open_splits(str(tmp_path), streaming=streaming)["test"])
    expected = [{**CELLS[0], "question": 'a\t "b"\nc'}, CELLS[1]] if ".tsv" in name else CELLS
    assert parsed(rows) == expected
    assert [row["row_place"] for row in rows] == [f"{name} lines 2 to 3", f"{name} line 5"]


def test_a_bad_line_of_a_table_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_bytes(b'a,b\n1,2\n1\n1,2,3\n"x"y,2\n\xff,2\n3,4\n"open,5\n6,7\n')
    rows = list(open_splits(str(path))["test"])
    assert [row["row_error"] for row in rows] == [
        None,
        "must have 2 cells, as many as the first line, got 1",
        "must have 2 cells, as many as the first line, got 3",
        "not valid CSV: ',' expected after '\"'",
        "not valid UTF-8",
        None,
        "not valid CSV: unexpected end of data",
    ]
    assert rows[-1]["row_place"] == "test.csv lines 8 to 9"


def test_a_table_needs_names(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match=r"cannot be read as csv: must name each column once .* got 'a,a'"):
        open_splits(str(tmp_path / "test.csv"))
    (tmp_path / "test.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"cannot be read as csv: must hold rows as a list or lines, got none"):
        open_splits(str(tmp_path / "test.csv"))


def test_long_cells(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(f"a,b\n{'x' * 200_000},1\n")
    (row,) = parsed(open_splits(str(tmp_path))["test"])
    assert len(row["a"]) == 200_000


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_json(tmp_path: Path, suffix: str, streaming: bool) -> None:
    for name, text in (("train.jsonl", "\n".join(LINES)), ("valid.json", json.dumps(ROWS)), ("test.txt", "a\nb\n")):
        compress(tmp_path / f"{name}{suffix}", text.encode())
    found = open_splits(str(tmp_path), streaming=streaming)
    assert parsed(found["train"]) == parsed(found["validation"]) == ROWS
    assert [row["text"] for row in found["test"]] == ["a", "b"]


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        path = compress(tmp_path / f"train.jsonl{suffix}", "\n".join(LINES * 1000).encode())
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=rf"path: .*train\.jsonl{suffix} cannot be read as jsonl: "):
            list(open_splits(str(path))["train"])


@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_and_saved_folders(tmp_path: Path, streaming: bool) -> None:
    rows = Dataset.from_list(ROWS)
    rows.with_format("numpy").save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "two")
    (tmp_path / "test.arrow").write_bytes(next((tmp_path / "one").glob("*.arrow")).read_bytes())
    for name, splits in (("one", ["train"]), ("two", ["train", "validation"]), ("test.arrow", ["test"])):
        found = open_splits(str(tmp_path / name), streaming=streaming)
        assert sorted(found) == splits
        for part in found.values():
            assert isinstance(part, IterableDataset) is streaming
            assert list(part) == ROWS


def test_a_damaged_saved_folder_is_an_error(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"path: .*one cannot be read as written by save_to_disk"):
        open_splits(str(tmp_path / "one"))


@pytest.mark.parametrize("ending", ["", "-0123456789abcdef"])
def test_a_clone_of_a_hub_repository(tmp_path: Path, ending: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\n---\n")
    for split in ("train", "test"):
        for shard, row in enumerate(ROWS):
            Dataset.from_list([row]).to_parquet(tmp_path / "data" / f"{split}-0000{shard}-of-00002{ending}.parquet")
    found = open_splits(str(tmp_path))
    assert [row["question"] for row in found["train"]] == [row["question"] for row in ROWS]
    assert sorted(found) == ["test", "train"]


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"train\.parquet must hold rows, got a Git LFS pointer. Fetch .*git lfs pull"):
        find_splits(str(tmp_path))["train"]()


def test_shards_of_two_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.csv"):
        (tmp_path / name).write_text(LINES[0])
    with pytest.raises(ValueError, match="holds several files for the split 'train'"):
        open_splits(str(tmp_path))
