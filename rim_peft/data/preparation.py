"""Rows → token ids, with every row that cannot be trained on reported and none cut."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from rim_peft.data.caching import source_hash
from rim_peft.data.collator import grounding_readouts, refinement_readouts
from rim_peft.data.examples import (
    ROW_ERROR,
    SHOWN_ROWS,
    BadRowsError,
    Example,
    Question,
    RowError,
    Templates,
    list_rows,
    read_example,
)
from rim_peft.data.tokenization import Encoder, TokenizedExample, Written, tokenize_example, tokenize_prompts

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

COLUMNS = ("prompt_ids", "step_ids", "answer_ids")


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_steps: bool,
    num_blocks: int,
    block_length: int,
    templates: Templates | None = None,
    max_length: int | None = None,
    max_positions: int | None = None,
    on_bad_rows: str = "error",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenise rows with ``question``, ``answer`` and ``steps`` into ``prompt_ids``, ``step_ids`` and ``answer_ids``.

    A streamed dataset is worked through while it is read, and its bad rows are met then.

    Args:
        dataset: one split.
        tokenizer: the base model's.
        needs_steps: whether the stage trains on steps (stage 1) or on the answer alone (stage 2).
        num_blocks: blocks that every row has at the least; with ``needs_steps`` a row has as many as steps.
        block_length: tokens in a block, begin and end included.
        templates: how prompt, steps and answer are written.
        max_length: longest row in tokens: prompt, blocks and all readouts; no limit where None.
        max_positions: positions that the model has; no limit where None.
        on_bad_rows: ``"error"`` lists the bad rows and stops, ``"drop"`` leaves them out and logs how many.
        num_proc: processes that tokenise a table; one where None. A stream is tokenised where it is read.

    Raises:
        BadRowsError: rows are malformed, empty, too long, or without the steps that the stage needs (with ``"drop"``:
            all of them).
        ValueError: ``on_bad_rows`` or the tokenizer is unusable, or the dataset is not one split, or has no rows.
    """
    if on_bad_rows not in ("error", "drop"):
        raise ValueError(f"on_bad_rows: must be 'error' or 'drop', got {on_bad_rows!r}.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"dataset: must be a Dataset or IterableDataset, got {type(dataset).__name__}. Give one of its splits."
        )
    encoder = Encoder(tokenizer, templates or Templates())
    limits = _Limits(needs_steps, num_blocks, block_length, max_length, max_positions)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, encoder, limits, drop=on_bad_rows == "drop")
    return _prepare_table(dataset, encoder, limits, drop=on_bad_rows == "drop", num_proc=num_proc)


@dataclass(frozen=True)
class _Limits:
    """What a row must have in a stage, and how long it may get."""

    needs_steps: bool
    num_blocks: int
    block_length: int
    max_length: int | None
    max_positions: int | None

    def check_steps(self, example: Example) -> None:
        if self.needs_steps and example.steps is None:
            raise RowError("steps: there are none, and stage 1 needs at least one")

    def check_length(self, row: TokenizedExample) -> None:
        readouts = (grounding_readouts if self.needs_steps else refinement_readouts)(row, num_blocks=self.num_blocks)
        prompt = len(row["prompt_ids"])
        length = prompt + len(readouts) * self.block_length + sum(len(readout) for readout in readouts)
        if self.max_length is not None and length > self.max_length:
            parts = f"prompt, {len(readouts)} blocks and readouts"
            raise RowError(f"too long: {parts} take {length} tokens, max_length is {self.max_length}")
        last = max(prompt + k * self.block_length + len(readout) for k, readout in enumerate(readouts, start=1))
        if self.max_positions is not None and last > self.max_positions:
            raise RowError(f"too long: readouts reach {last} positions, the model has {self.max_positions}")


def _tokenize_rows(
    rows: Sequence[Mapping[str, Any]], encoder: Encoder, limits: _Limits
) -> list[TokenizedExample | RowError]:
    """Return each row's token ids, or what is wrong with it."""
    results: list[TokenizedExample | RowError] = []
    written: dict[int, Written] = {}
    for place, row in enumerate(rows):
        try:
            example = read_example(row)
            limits.check_steps(example)
            written[place] = encoder.write(example)
            results.append(_NO_TOKENS)
        except RowError as error:
            results.append(RowError(f"{error}{_excerpt(row)}"))
    for place, tokenized in zip(written, encoder.encode(list(written.values())), strict=True):
        try:
            encoder.check(tokenized)
            limits.check_length(tokenized)
            results[place] = tokenized
        except RowError as error:
            results[place] = RowError(f"{error}{_excerpt(rows[place])}")
    return results


_NO_TOKENS: TokenizedExample = {"prompt_ids": [], "step_ids": [], "answer_ids": []}
_ID = Value("int32")
_TYPES = {"prompt_ids": [_ID], "step_ids": [[_ID]], "answer_ids": [_ID]}


def _excerpt(row: Mapping[str, Any]) -> str:
    """Name a row by the beginning of its question: after a split or a filter its index is no longer the file's."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        return ""
    return f" (question: {question[:40]!r}{'...' if len(question) > 40 else ''})"


def _rows_of(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _prepare_table(dataset: Dataset, encoder: Encoder, limits: _Limits, *, drop: bool, num_proc: int | None) -> Dataset:
    if len(dataset) == 0:
        raise ValueError("dataset: must have rows, got none. Look at its path and split.")
    source = source_hash(__name__, Encoder.__module__, Example.__module__)
    tokenized = dataset.map(
        _tokenize_table,
        batched=True,
        remove_columns=dataset.column_names,
        features=Features({**_TYPES, ROW_ERROR: Value("string")}),
        fn_kwargs={"encoder": encoder, "limits": limits, "source": source},
        num_proc=num_proc,
        desc="Tokenizing",
    )
    errors = tokenized[ROW_ERROR]
    bad = [(index, error) for index, error in enumerate(errors) if error is not None]
    tokenized = tokenized.remove_columns(ROW_ERROR)
    if not bad:
        return tokenized
    if not drop or len(bad) == len(errors):
        raise BadRowsError(bad)
    logger.warning("dataset: dropped %d of %d rows.\n%s", len(bad), len(errors), "\n".join(list_rows(bad)))
    dropped = {index for index, _ in bad}
    return tokenized.select([index for index in range(len(errors)) if index not in dropped])


def _tokenize_table(
    batch: Mapping[str, Sequence[Any]], encoder: Encoder, limits: _Limits, source: str
) -> dict[str, list[Any]]:
    """Tokenise a batch; ``source`` makes ``datasets`` work anew, not from its cache, when the code has changed."""
    results = _tokenize_rows(_rows_of(batch), encoder, limits)
    rows = [_NO_TOKENS if isinstance(result, RowError) else result for result in results]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in COLUMNS}  # type: ignore[literal-required]
    columns[ROW_ERROR] = [str(result) if isinstance(result, RowError) else None for result in results]
    return columns


def _prepare_stream(dataset: IterableDataset, encoder: Encoder, limits: _Limits, *, drop: bool) -> IterableDataset:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    return dataset.map(
        _StreamRows(encoder, limits, drop),
        batched=True,
        batch_size=1,
        with_indices=True,
        remove_columns=columns,
        features=Features(_TYPES),
    )


@dataclass
class _StreamRows:
    """Tokenise a stream's rows: raises at a bad row, or drops it and counts.

    A stream may be endless or left early, so the count is logged as it grows: row by row up to ten, then at each power
    of two.
    """

    encoder: Encoder
    limits: _Limits
    drop: bool
    num_dropped: int = 0

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        if 0 in indices:  # a new pass
            self.num_dropped = 0
        results = _tokenize_rows(_rows_of(batch), self.encoder, self.limits)
        rows: list[TokenizedExample] = []
        for index, result in zip(indices, results, strict=True):
            if not isinstance(result, RowError):
                rows.append(result)
            elif self.drop:
                self._count(index, result)
            else:
                raise BadRowsError([(index, str(result))])
        return {name: [row[name] for row in rows] for name in COLUMNS}  # type: ignore[literal-required]

    def _count(self, index: int, reason: RowError) -> None:
        self.num_dropped += 1
        if self.num_dropped <= SHOWN_ROWS:
            logger.warning("dropped row %d of the stream: %s", index, reason)
        elif self.num_dropped & (self.num_dropped - 1) == 0:
            logger.warning("dropped %d rows of the stream so far.", self.num_dropped)
