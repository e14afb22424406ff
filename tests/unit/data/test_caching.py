import os
import sys
import types
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets

from rim_peft.data.hashes import digest_of, rows_hash, source_hash
from rim_peft.tasks import get_task

ROWS = [{"question": name, "steps": [name], "answer": None} for name in "abcd"]


def test_the_hash_is_that_of_the_modules_sources() -> None:
    assert source_hash(__name__) == source_hash(__name__)
    assert source_hash(__name__) != source_hash("rim_peft.data.cache")
    assert source_hash(__name__, "rim_peft.data.cache") != source_hash(__name__)


def test_a_module_without_source_counts_by_name() -> None:
    for name in ("typed_in_a", "typed_in_b"):
        sys.modules[name] = types.ModuleType(name)
    assert source_hash("typed_in_a") != source_hash("typed_in_b")
    del sys.modules["typed_in_a"], sys.modules["typed_in_b"]


def test_a_part_is_not_what_stands_in_it() -> None:
    assert digest_of(b"ab", b"c") == digest_of(b"ab", b"c")
    assert len({digest_of(*parts) for parts in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""))}) == 4


def test_rows_are_known_by_their_values_and_order() -> None:
    rows = Dataset.from_list(ROWS)
    different = [
        rows,
        rows.select(range(2)),
        rows.select(range(1, 3)),
        rows.select([0, 2]),
        rows.select([2, 0]),
        rows.filter(lambda row: row["question"] != "c"),
        rows.rename_column("answer", "solution"),
        rows.select_columns(["steps", "question", "answer"]),
        Dataset.from_list([*ROWS[:3], {**ROWS[3], "answer": ""}]),
        concatenate_datasets([rows, rows]),
    ]
    hashes = [rows_hash(dataset) for dataset in different]
    assert len(set(hashes)) == len(different)
    assert hashes[0] == rows_hash(Dataset.from_list(ROWS))
    assert hashes[2:4] == [rows_hash(Dataset.from_list(ROWS).select(kept)) for kept in (range(1, 3), [0, 2])]


def test_files_of_the_same_time_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for index in range(2):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache-{index}")
        file = tmp_path / "test.jsonl"
        file.write_text(f'{{"question": "{index}", "answer": "#### 1"}}')
        os.utime(file, (0, 0))
        hashes.append(rows_hash(get_task("gsm8k").load("test", path=str(file))))
    assert hashes[0] != hashes[1]
