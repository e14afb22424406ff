"""What is tokenised once, and kept on disk."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import BadRowsError, Templates
from rim_peft.tasks import get_task
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows
from tests.unit.data.conftest import WriteRows, build_wrapping_tokenizer

ROWS: list[dict[str, Any]] = [
    {"question": "2 * 3", "steps": ["2+2=4", "6"], "answer": "6"},
    {"question": "1 + 1", "steps": ["2"], "answer": "2"},
]
STAGES: list[dict[str, Any]] = [
    {"needs_steps": True, "num_blocks": 0, "block_length": 4},
    {"needs_steps": False, "num_blocks": 3, "block_length": 6, "max_length": 100, "max_positions": 50},
]


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def _no_caching() -> Iterator[None]:
    datasets.disable_caching()
    yield
    datasets.enable_caching()


def prepare(
    rows: list[dict[str, Any]] | Dataset, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> list[Any]:
    """Prepare rows for the first stage, and return the result as rows."""
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return list(prepare_rows(dataset, tokenizer or build_tokenizer(), **{**STAGES[0], **options}))


def prepare_anew(rows: list[dict[str, Any]] | Dataset, **options: Any) -> list[Any]:
    """Prepare rows without what is stored."""
    datasets.disable_caching()
    try:
        return prepare(rows, **options)
    finally:
        datasets.enable_caching()


def test_the_second_stage_does_not_tokenise_again(texts: list[str]) -> None:
    first, second = [prepare(ROWS, **stage) for stage in STAGES]
    assert first == second
    assert [texts.count(text) for text in ("2 * 3\n", "2+2=4", "6", "2")] == [1 + 1, 1, 2, 2]  # once for its beginning


def test_both_stages_share_one_file_named_by_a_hash(cache: Path) -> None:
    for stage in STAGES:
        prepared = prepare_rows(Dataset.from_list(ROWS), build_tokenizer(), **stage)
    (file,) = (cache / "rim_peft").iterdir()
    assert [entry["filename"] for entry in prepared.cache_files] == [str(file)]  # mapped, not in memory
    assert file.suffix == ".arrow"
    assert len(file.stem) == 32


def print_what_is_stored(*sources: Any) -> None:
    """Be a process in which a tokenizer gives nothing: print each source's rows, or None where it was asked."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise InterruptedError  # nothing else raises it

    setattr(PreTrainedTokenizerBase, "__call__", refuse)  # noqa: B010 - a method, for the type checker
    found: list[Any] = []
    for source in sources:
        try:
            found.append(prepare(load_rows(source), tokenizer=build_wrapping_tokenizer("<bos> $A <eos>")))
        except InterruptedError:
            found.append(None)
    print(json.dumps(found))


def load_rows(source: Any) -> Dataset:
    """Rows of a file, or made in memory."""
    return get_task("gsm8k").load("test", path=source) if isinstance(source, str) else Dataset.from_list(source)


@pytest.mark.slow
def test_another_process_is_served_from_the_disk(cache: Path, write_rows: WriteRows) -> None:
    path = write_rows("test.jsonl", [{"question": "2 * 3", "answer": "<<2+2=4>> <<4+2=6>>\n#### 6"}])
    stored = [prepare(load_rows(it), tokenizer=build_wrapping_tokenizer("<bos> $A <eos>")) for it in (str(path), ROWS)]
    code = f"from {__name__} import *; print_what_is_stored({str(path)!r}, {ROWS!r}, {ROWS[:1]!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(done.stdout) == [*stored, None]


@pytest.mark.usefixtures("_no_caching")
def test_nothing_is_stored_or_read_where_caching_is_disabled(texts: list[str], cache: Path) -> None:
    first = prepare(ROWS)
    texts.clear()
    assert prepare(ROWS) == first
    assert texts
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_done_without(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder would be", encoding="utf-8")
    assert prepare(ROWS) == prepare_anew(ROWS)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{cache}" in record.getMessage()
    assert "tokenising in memory" in record.getMessage()


@pytest.mark.parametrize("content", [b"", b"no table"])
def test_a_damaged_file_is_done_without(content: bytes, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(ROWS)
    (file,) = (cache / "rim_peft").iterdir()
    file.write_bytes(content)
    assert prepare(ROWS) == first
    assert f"{file} cannot be used" in caplog.text


def test_what_several_processes_store_serves_one(texts: list[str]) -> None:
    first = prepare(ROWS, num_proc=2)
    assert prepare(ROWS) == first
    assert texts == []  # those of other processes are not heard
    assert prepare_anew(ROWS) == first


def test_bad_rows_are_reported_from_the_disk_as_at_first(texts: list[str]) -> None:
    rows = [ROWS[0], {**ROWS[1], "answer": ""}, {**ROWS[1], "answer": "2<eos>2", "steps": None}]
    reasons = ["answer: is empty", "steps: there are none, and this training needs at least one"]
    later = "a step or the answer holds the EOS token '<eos>' before its end"
    for _ in range(2):
        for stage, expected in zip(STAGES, (reasons, [reasons[0], later]), strict=True):
            with pytest.raises(BadRowsError) as caught:
                prepare(rows, **stage, templates=Templates(allow_special_tokens=True))
            assert caught.value.rows == [(i, f"{it} (question: '1 + 1')") for i, it in enumerate(expected, start=1)]
    assert texts.count("2+2=4") == 1
