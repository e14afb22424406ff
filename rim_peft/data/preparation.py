"""Rows → token ids, with every row that cannot be trained on reported and none cut."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import ROW_ERROR, SHOWN_ROWS, BadRowsError, Question, RowError, Templates, list_rows
from rim_peft.data.limits import Limits
from rim_peft.data.objective import Objective
from rim_peft.data.table import COLUMNS, TYPES, check_table, rows_of, tokenize_rows, tokenize_table
from rim_peft.data.tokenization import (
    Encoder,
    all_ids,
    check_vocabulary,
    tokenize_example,
    tokenize_prompts,
)

__all__ = [
    "COLUMNS",
    "SHOWN_ROWS",
    "BadRowsError",
    "Question",
    "prepare_dataset",
    "tokenize_example",
    "tokenize_prompts",
]

logger = logging.getLogger(__name__)


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    *,
    templates: Templates | None = None,
    max_length: int | None = None,
    max_positions: int | None = None,
    on_bad_rows: str = "error",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenise rows with ``question``, ``answer`` and ``steps`` into ``prompt_ids``, ``step_ids`` and ``answer_ids``.

    A table is tokenised once for both stages and every later run (:func:`~rim_peft.data.table.tokenize_table`). A
    streamed dataset is worked through while it is read, and its bad rows are met then.

    Args:
        dataset: one split.
        tokenizer: the base model's.
        objective: what the stage trains of a row. Its blocks' ids come after those of the base's vocabulary.
        templates: how prompt, steps and answer are written.
        max_length: longest row in tokens: prompt, blocks and all readouts; no limit where None.
        max_positions: positions that the model has; no limit where None.
        on_bad_rows: ``"error"`` lists the bad rows and stops, ``"drop"`` leaves them out and logs how many.
        num_proc: processes that tokenise a table; one where None. A stream is tokenised where it is read.

    Raises:
        BadRowsError: rows are malformed, empty, too long, or without the steps that the stage needs (with ``"drop"``:
            all of them).
        ValueError: ``on_bad_rows`` or the tokenizer is unusable, the base has no rows for some ids, or the dataset is
            not one split, has a transform, or has no rows.
    """
    if on_bad_rows not in ("error", "drop"):
        raise ValueError(f"on_bad_rows: must be 'error' or 'drop', got {on_bad_rows!r}.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"dataset: must be a Dataset or IterableDataset, got {type(dataset).__name__}. Give one of its splits."
        )
    encoder = Encoder(tokenizer, templates or Templates())
    limits = Limits(objective, max_length, max_positions)
    drop = on_bad_rows == "drop"
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, encoder, limits, drop=drop)
    return _prepare_table(dataset, encoder, limits, drop=drop, num_proc=num_proc)


def _prepare_table(dataset: Dataset, encoder: Encoder, limits: Limits, *, drop: bool, num_proc: int | None) -> Dataset:
    if len(dataset) == 0:
        raise ValueError("dataset: must have rows, got none. Look at its path and split.")
    if dataset.format["type"] == "custom":
        raise ValueError(
            "dataset: must have no transform, got one, which would be asked for the tokenised rows too. Apply it with "
            "dataset.map."
        )
    dataset = dataset.with_format(None)
    tokenized = tokenize_table(dataset, encoder, num_proc=num_proc)
    check_table(tokenized, encoder.tokenizer, limits.objective.blocks.begin)
    bad = _find_bad_rows(dataset, tokenized, limits)
    tokenized = tokenized.remove_columns(ROW_ERROR)
    if not bad:
        return tokenized
    if not drop or len(bad) == len(dataset):
        raise BadRowsError(bad)
    logger.warning("dataset: dropped %d of %d rows.\n%s", len(bad), len(dataset), "\n".join(list_rows(bad)))
    return tokenized.select(np.delete(np.arange(len(dataset)), [index for index, _ in bad]))


def _find_bad_rows(dataset: Dataset, tokenized: Dataset, limits: Limits) -> list[tuple[int, str]]:
    """Return the indices of bad rows with what is wrong; looks closely only at rows that may be bad."""
    table = tokenized.with_format("arrow")[:]
    suspects = np.flatnonzero(limits.may_fail(table) | table[ROW_ERROR].is_valid().to_numpy()).tolist()
    bad: list[tuple[int, str]] = []
    for start in range(0, len(suspects), 1000):
        indices = suspects[start : start + 1000]
        for index, row, result in zip(indices, rows_of(dataset[indices]), rows_of(tokenized[indices]), strict=True):
            error = result.pop(ROW_ERROR)
            tokens: Any = result if error is None else RowError(error)
            reason = limits.explain(row, tokens)
            if reason is not None:
                bad.append((index, reason))
    return bad


def _prepare_stream(dataset: IterableDataset, encoder: Encoder, limits: Limits, *, drop: bool) -> IterableDataset:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    return dataset.map(
        _StreamRows(encoder, limits, drop),
        batched=True,
        batch_size=1,
        with_indices=True,
        remove_columns=columns,
        features=Features(TYPES),
    )


@dataclass
class _StreamRows:
    """Tokenise a stream's rows: raises at a bad row, or drops it and counts.

    A stream may be endless or left early, so the count is logged as it grows: row by row up to ten, then at each power
    of two.
    """

    encoder: Encoder
    limits: Limits
    drop: bool
    num_dropped: int = 0

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        if 0 in indices:  # a new pass
            self.num_dropped = 0
        rows = rows_of(batch)
        vocab_size = self.limits.objective.blocks.begin
        good: list[Any] = []
        for index, row, result in zip(indices, rows, tokenize_rows(rows, self.encoder), strict=True):
            reason = self.limits.explain(row, result)
            if reason is None and not isinstance(result, RowError):
                check_vocabulary(all_ids(result), self.encoder.tokenizer, vocab_size, where=f"row {index}")
                good.append(result)
            elif self.drop:
                self._count(index, str(reason))
            else:
                raise BadRowsError([(index, str(reason))])
        return {name: [result[name] for result in good] for name in COLUMNS}

    def _count(self, index: int, reason: str) -> None:
        self.num_dropped += 1
        if self.num_dropped <= SHOWN_ROWS:
            logger.warning("dropped row %d of the stream: %s", index, reason)
        elif self.num_dropped & (self.num_dropped - 1) == 0:
            logger.warning("dropped %d rows of the stream so far.", self.num_dropped)
