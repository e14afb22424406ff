"""A table's rows → token ids, worked out once and kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from rim_peft.data.caching import digest_of, rows_hash, source_hash, tokenizer_hash
from rim_peft.data.examples import ROW_ERROR, Example, RowError, read_example
from rim_peft.data.special_tokens import SpecialTokens
from rim_peft.data.stored import cache_folder, hold, prune
from rim_peft.data.tokenization import Encoder, TokenizedExample, Written, all_ids, check_vocabulary

logger = logging.getLogger(__name__)

COLUMNS = ("prompt_ids", "step_ids", "answer_ids")

_ID = Value("int32")
TYPES = {"prompt_ids": [_ID], "step_ids": [[_ID]], "answer_ids": [_ID]}

_NO_TOKENS: TokenizedExample = {"prompt_ids": [], "step_ids": [], "answer_ids": []}


def tokenize_rows(rows: Sequence[Mapping[str, Any]], encoder: Encoder) -> list[TokenizedExample | RowError]:
    """Return each row's token ids, or what is wrong with it in any stage."""
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
    """Tokenise a table's rows, or take what is stored of the same rows, tokenizer, templates and code.

    It is stored in a file of that content's hash in the cache folder of ``datasets``, unless caching is disabled there;
    tables that were not used for long are deleted (:mod:`rim_peft.data.stored`).

    Returns:
        As many rows, with token ids, and ``row_error`` where a row has none: what is wrong with it.
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
        hold(list(file.parent.glob(f"{key}*.arrow")))  # so that no process deletes it while it is opened
        table = dataset.map(_tokenize_batch, new_fingerprint=key, cache_file_name=str(file), **options)
        hold([Path(used["filename"]) for used in table.cache_files])
        prune()
        return table
    except (OSError, pa.ArrowInvalid) as error:
        logger.warning("%s cannot be used (%s): the rows are tokenised in memory, and anew each time.", file, error)
        return dataset.map(_tokenize_batch, new_fingerprint=key, keep_in_memory=True, **options)


def check_table(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Refuse tokenised rows with ids that the base has no rows for.

    Raises:
        ValueError: as :func:`~rim_peft.data.tokenization.check_vocabulary`; names the first such row.
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
    """Return a batch of columns as rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _content_hash(dataset: Dataset, encoder: Encoder) -> str | None:
    tokenizer = tokenizer_hash(encoder.tokenizer)
    if tokenizer is None:
        return None
    source = source_hash(__name__, Encoder.__module__, SpecialTokens.__module__, Example.__module__)
    # Other columns are not read, and shall not make it another table.
    read = [name for name in dataset.column_names if name in ("question", "steps", "answer", ROW_ERROR)]
    dataset = dataset.select_columns(read) if read else dataset
    return digest_of(*(part.encode() for part in (source, rows_hash(dataset), tokenizer, repr(encoder.templates))))


def _tokenize_batch(batch: Mapping[str, Sequence[Any]], encoder: Encoder) -> dict[str, list[Any]]:
    results = tokenize_rows(rows_of(batch), encoder)
    rows = [_NO_TOKENS if isinstance(result, RowError) else result for result in results]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in COLUMNS}  # type: ignore[literal-required]
    columns[ROW_ERROR] = [str(result) if isinstance(result, RowError) else None for result in results]
    return columns
