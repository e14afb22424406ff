from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import BOS_ID, EOS_ID, build_tokenizer

DATA_DIR = Path(os.environ.get("RIM_DATA_DIR", Path(__file__).parents[3].parent / "shared" / "data"))
"""The authors' own files, which are not part of the repository."""

# Formats are tested on files written here; counts of the authors' files where those are.
collect_ignore = [] if DATA_DIR.is_dir() else ["test_published_files.py"]

WriteRows = Callable[[str, Iterable[Mapping[str, Any]]], Path]


@pytest.fixture(scope="package", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that have been given to a tokenizer."""
    given: list[str] = []
    call = PreTrainedTokenizerBase.__call__

    def listen(self: PreTrainedTokenizerBase, text: Any, **options: Any) -> Any:
        given.extend([text] if isinstance(text, str) else text)
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", listen)
    return given


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows to a JSON Lines file in the test's folder."""

    def write(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def build_wrapping_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer which puts special tokens around texts, as ``"<bos> $A"`` does."""
    tokenizer = build_tokenizer()
    special = [("<bos>", BOS_ID), ("<eos>", EOS_ID)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer
