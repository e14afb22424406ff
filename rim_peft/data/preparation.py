"""Tokenise rows for a stage; every bad row is reported, none is truncated."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rim_peft.data.cache import COLUMNS, TYPES, check_table, rows_of, tokenize_rows, tokenize_table
from rim_peft.data.examples import (
    ROW_ERROR,
    SHOWN_ROWS,
    BadRowsError,
    RowError,
    Templates,
    list_rows,
    read_example,
)
from rim_peft.data.objective import Objective, list_lengths
from rim_peft.data.tokenization import (
    Encoder,
    TokenizedExample,
    all_ids,
    check_vocabulary,
)

_WHOSE = " (max_position_embeddings; with longrope original_max_position_embeddings)"


@dataclass(frozen=True)
class Limits:
    """A stage's requirements for a row.

    Attributes:
        objective: the stage's objective.
        max_length: longest row in tokens; None for no limit.
        max_positions: number of the model's positions; None for no limit.
    """

    objective: Objective
    max_length: int | None
    max_positions: int | None

    def explain(self, row: Mapping[str, Any], tokenized: TokenizedExample | RowError) -> str | None:
        """Return why a row is bad in this stage; None if it is good.

        Args:
            row: the row before tokenisation.
            tokenized: its token ids, or the error if it has none.
        """
        try:
            if self.objective.needs_steps and read_example(row).steps is None:
                raise RowError("steps: there are none, and this training needs at least one")
            if isinstance(tokenized, RowError):
                raise tokenized
            self._check_length(tokenized)
        except RowError as error:
            return f"{error}{_excerpt(row)}"
        return None

    def may_fail(self, tokenized: pa.Table) -> NDArray[np.bool_]:
        """Return which rows may be too long or lack steps, from the lengths alone.

        A fast filter before :meth:`explain`: it misses none of those rows and includes few others.
        """
        limit = min(limit if limit is not None else math.inf for limit in (self.max_length, self.max_positions))
        lacks_steps = self.objective.needs_steps & (list_lengths(tokenized["step_ids"]) == 0)
        return (self.objective.most_tokens(tokenized) > limit) | lacks_steps

    def _check_length(self, row: TokenizedExample) -> None:
        tokens, positions = self.objective.describe_length(row)
        if self.max_length is not None and self.objective.num_tokens(row) > self.max_length:
            raise RowError(f"too long: {tokens}, max_length is {self.max_length}")
        if self.max_positions is not None and self.objective.num_positions(row) > self.max_positions:
            raise RowError(f"too long: {positions}, the model has {self.max_positions} positions{_WHOSE}")


def _excerpt(row: Mapping[str, Any]) -> str:
    """Identify a row by the start of its question, since after a split or filter its index differs from the file's."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        return ""
    return f" (question: {question[:40]!r}{'...' if len(question) > 40 else ''})"


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

    A table is tokenised once and cached for both stages and later runs (:func:`~rim_peft.data.cache.tokenize_table`).
    A stream is tokenised while it is read, so its bad rows are only found then.

    Args:
        dataset: one split.
        objective: the stage's objective; the ids of its blocks start after the base's vocabulary.
        max_length: longest row in tokens: prompt, blocks and all readouts; None for no limit.
        max_positions: number of the model's positions; None for no limit.
        on_bad_rows: ``"error"`` lists the bad rows and stops, ``"drop"`` drops them and logs how many.
        num_proc: number of processes that tokenise a table; None for one. A stream ignores it.

    Raises:
        BadRowsError: rows are malformed, empty, too long, or without the steps that the stage needs (with ``"drop"``:
            all of them).
        ValueError: ``on_bad_rows`` or the tokenizer is unusable, an id exceeds the base's embedding, or the dataset is
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
            "dataset: must have no transform, got one, which would also apply to the tokenised rows. Apply it with "
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
    """Return the indices of bad rows with the reasons; only rows that may be bad are checked in full."""
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
    """Tokenise a stream's rows; raise at a bad row, or drop and count it.

    A stream may be endless or abandoned early, so the count is logged as it grows: each of the first ten rows, then at
    powers of two.
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
