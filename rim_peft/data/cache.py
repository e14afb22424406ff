"""Tokenised tables, cached on disk under a hash of everything they depend on (:mod:`rim_peft.data.hashes`)."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from rim_peft.data.chats import CHAT_COLUMNS, Chat
from rim_peft.data.examples import ROW_ERROR, Example, RowError, read_example
from rim_peft.data.hashes import digest_of, rows_hash, source_hash, tokenizer_hash
from rim_peft.data.special_tokens import SpecialTokens
from rim_peft.data.tokenization import Encoder, TokenizedExample, Written, all_ids, check_vocabulary

try:
    import fcntl
except ImportError:  # without it we cannot tell which files are in use, so none is deleted
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DAYS, GIGABYTES = "RIM_PEFT_CACHE_DAYS", "RIM_PEFT_CACHE_GB"
"""Environment variables: days to keep an unused table, and the size limit of the folder."""
_DEFAULTS = {DAYS: 30.0, GIGABYTES: 5.0}
_SECONDS_A_DAY = 24 * 60 * 60
_held: dict[Path, IO[bytes]] = {}
"""Files used by this process, each kept open with a shared lock; at most the last ``_MOST_HELD``."""
_MOST_HELD = 100


@dataclass(frozen=True)
class StoredTable:
    """A tokenised table: one file, or one per process that wrote it.

    Attributes:
        files: its files.
        num_bytes: their total size.
        used: time of last use, in seconds since 1970.
    """

    files: tuple[Path, ...]
    num_bytes: int
    used: float


def cache_folder() -> Path:
    """Return the folder of the tables, inside the cache folder of ``datasets``."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "rim_peft"


def limits() -> tuple[float, float]:
    """Return how many days an unused table is kept, and how many gigabytes are kept in all.

    Raises:
        ValueError: an environment variable is not a number of at least 0.
    """
    found = []
    for name, usual in _DEFAULTS.items():
        text = os.environ.get(name, str(usual))
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not number >= 0:
            raise ValueError(f"{name}: must be a number of at least 0, got {text[:40]!r}. Unset it to use {usual:g}.")
        found.append(number)
    return found[0], found[1]


def list_tables() -> list[StoredTable]:
    """Return all tables, least recently used first, including incomplete files of killed processes."""
    groups: dict[str, list[tuple[Path, os.stat_result]]] = {}
    for path in cache_folder().glob("*"):
        with contextlib.suppress(OSError):  # another process has deleted it
            groups.setdefault(path.stem.partition("_")[0], []).append((path, path.stat()))
    tables = [
        StoredTable(
            tuple(path for path, _ in group),
            sum(stat.st_size for _, stat in group),
            max(stat.st_mtime for _, stat in group),
        )
        for group in groups.values()
    ]
    return sorted(tables, key=lambda table: table.used)


def hold(files: Collection[Path]) -> None:
    """Mark a table as used now, and prevent any process from deleting it until this one ends."""
    for path in files:
        with contextlib.suppress(OSError):  # a folder owned by someone else can still be read
            os.utime(path)
            if fcntl is not None and path not in _held:
                file = path.open("rb")
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                _held[path] = file
        while len(_held) > _MOST_HELD:
            _held.pop(next(iter(_held))).close()


def prune() -> int:
    """Delete tables unused for too long, then the oldest while the folder is too large; return how many.

    A table that any process uses is kept.
    """
    days, gigabytes = limits()
    tables = list_tables()
    left = sum(table.num_bytes for table in tables)
    too_old = time.time() - days * _SECONDS_A_DAY
    deleted = 0
    for table in tables:
        if (table.used < too_old or left > gigabytes * 1e9) and _delete(table):
            left -= table.num_bytes
            deleted += 1
    if deleted:
        logger.info(
            "deleted %d tokenised tables from %s: unused for too long, or over the limit.", deleted, cache_folder()
        )
    return deleted


def clear() -> tuple[int, int]:
    """Delete all tables that are not in use; return the numbers of deleted and remaining tables."""
    tables = list_tables()
    deleted = sum(_delete(table) for table in tables)
    return deleted, len(tables) - deleted


def _delete(table: StoredTable) -> bool:
    """Delete a table unless a process uses it."""
    with contextlib.ExitStack() as stack:
        if not all(stack.enter_context(_alone(path)) for path in table.files):
            return False
        for path in table.files:
            path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Lock a file exclusively; yield False if some process uses it."""
    if fcntl is None or path in _held:
        yield False
        return
    try:
        file = path.open("rb")
    except OSError:  # gone, or another user's
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except OSError:
            is_alone = False
        yield is_alone


COLUMNS = ("prompt_ids", "step_ids", "answer_ids")

_ID = Value("int32")
TYPES = {"prompt_ids": [_ID], "step_ids": [[_ID]], "answer_ids": [_ID]}

_NO_TOKENS: TokenizedExample = {"prompt_ids": [], "step_ids": [], "answer_ids": []}


def tokenize_rows(rows: Sequence[Mapping[str, Any]], encoder: Encoder) -> list[TokenizedExample | RowError]:
    """Return each row's token ids, or the error that makes it unusable in every stage."""
    results: list[TokenizedExample | RowError] = []
    written: dict[int, Written] = {}
    for place, row in enumerate(rows):
        try:
            written[place] = encoder.write(read_example(row))
            results.append(_NO_TOKENS)
        except RowError as error:
            results.append(error)
    for place, tokenized in zip(written, encoder.encode(list(written.values())), strict=True):
        try:
            encoder.check(tokenized)
            results[place] = tokenized
        except RowError as error:
            results[place] = error
    return results


def tokenize_table(dataset: Dataset, encoder: Encoder, *, num_proc: int | None) -> Dataset:
    """Tokenise a table's rows, or load the cached result for the same rows, tokenizer, templates and code.

    The cache file is named after a hash of these and is in the cache folder of ``datasets``; with caching disabled in
    ``datasets`` there is none. Tables unused for long are deleted (:mod:`rim_peft.data.cache`).

    Returns:
        One row per input row, with its token ids, or with the reason in ``row_error`` if it has none.
    """
    options: dict[str, Any] = {
        "batched": True,
        "remove_columns": dataset.column_names,
        "features": Features({**TYPES, ROW_ERROR: Value("string")}),
        "fn_kwargs": {"encoder": encoder},
        "num_proc": num_proc,
        "desc": "Tokenizing",
    }
    key = _content_hash(dataset, encoder) if datasets.is_caching_enabled() else None
    if key is None:
        return dataset.map(_tokenize_batch, load_from_cache_file=False, **options)
    file = cache_folder() / f"{key}.arrow"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        hold(list(file.parent.glob(f"{key}*.arrow")))  # no process may delete it while it is being opened
        table = dataset.map(_tokenize_batch, new_fingerprint=key, cache_file_name=str(file), **options)
        hold([Path(used["filename"]) for used in table.cache_files])
        prune()
        return table
    except (OSError, pa.ArrowInvalid) as error:
        logger.warning("%s cannot be used (%s): tokenising in memory, without caching the result.", file, error)
        return dataset.map(_tokenize_batch, new_fingerprint=key, keep_in_memory=True, **options)


def check_table(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Refuse tokenised rows with ids beyond the base's embedding.

    Raises:
        ValueError: as :func:`~rim_peft.data.tokenization.check_vocabulary`; names the first bad row.
    """
    if vocab_size is None:
        return
    first = 0
    for batch in dataset.select_columns(list(COLUMNS)).with_format("arrow").iter(batch_size=10_000):
        if any((_largest(batch[name]) or 0) >= vocab_size for name in COLUMNS):
            for index, row in enumerate(batch.to_pylist(), start=first):
                check_vocabulary(all_ids(row), tokenizer, vocab_size, where=f"row {index}")
        first += batch.num_rows


def _largest(lists: Any) -> int | None:
    values = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    while pa.types.is_list(values.type):
        values = values.flatten()
    largest: int | None = pc.max(values).as_py()
    return largest


def rows_of(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Convert a batch of columns to rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _content_hash(dataset: Dataset, encoder: Encoder) -> str | None:
    tokenizer = tokenizer_hash(encoder.tokenizer)
    if tokenizer is None:
        return None
    source = source_hash(__name__, *(part.__module__ for part in (Encoder, SpecialTokens, Example, Chat, RowError)))
    # Other columns are not read, so they must not change the hash.
    names = ("question", "steps", "answer", *CHAT_COLUMNS, ROW_ERROR)
    read = [name for name in dataset.column_names if name in names]
    dataset = dataset.select_columns(read) if read else dataset
    return digest_of(*(part.encode() for part in (source, rows_hash(dataset), tokenizer, repr(encoder.templates))))


def _tokenize_batch(batch: Mapping[str, Sequence[Any]], encoder: Encoder) -> dict[str, list[Any]]:
    results = tokenize_rows(rows_of(batch), encoder)
    rows = [_NO_TOKENS if isinstance(result, RowError) else result for result in results]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in COLUMNS}  # type: ignore[literal-required]
    columns[ROW_ERROR] = [str(result) if isinstance(result, RowError) else None for result in results]
    return columns
