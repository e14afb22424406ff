"""A run's training and validation rows, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from rim_peft.data.chats import CHAT_COLUMNS
from rim_peft.data.examples import BadRowsError, Example, Question, RowError, log_dropped, read_example
from rim_peft.data.objective import Objective
from rim_peft.data.sources import hold_out
from rim_peft.recipe import DataOptions
from rim_peft.tasks.task import Task


@dataclass(frozen=True)
class RunRows:
    """Rows to train on and, unless validation is off, rows to validate on."""

    train: Dataset | IterableDataset
    validation: Dataset | None


def load_rows(options: DataOptions, task: Task) -> RunRows:
    """Load the rows of a recipe's section ``data``; held-out validation rows share no question with training rows.

    Raises:
        ValueError: there are too few rows to hold out ``validation_rows``.
        FileNotFoundError: the path or split does not exist.
    """
    train = task.load(options.train_split, path=options.path, streaming=options.streaming)
    validation = None
    if options.validation_rows and options.validation_split is not None:
        validation = task.load(options.validation_split, path=options.path)
        validation = validation.select(range(min(options.validation_rows, len(validation))))
    elif options.validation_rows:
        train, validation = _hold_out(train, options)
    if options.train_rows is not None:
        is_stream = isinstance(train, IterableDataset)
        size = options.train_rows
        train = train.take(size) if is_stream else train.select(range(min(size, len(train))))
    return RunRows(train, validation)


def check_validation(rows: Sized) -> None:
    """Check that there are rows to validate on.

    Raises:
        ValueError: there are none.
    """
    if not len(rows):
        raise ValueError("data.validation_rows: no row to validate on is left. Give more, or 0 for no validation.")


def read_examples(rows: Iterable[Mapping[str, Any]], *, on_bad_rows: str, limit: int | None = None) -> list[Example]:
    """Return rows as examples.

    Args:
        rows: rows with question, steps and answer.
        on_bad_rows: ``"error"`` lists bad rows and stops, ``"drop"`` omits and logs them.

    Raises:
        BadRowsError: there are bad rows, and they are not dropped.
    """
    examples: list[Example] = []
    bad: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        if limit is not None and index >= limit:
            break
        try:
            examples.append(read_example(row))
        except RowError as error:
            bad.append((index, str(error)))
    if bad and on_bad_rows == "error":
        raise BadRowsError(bad)
    log_dropped(bad, len(bad) + len(examples))
    return examples


def first_questions(task: Task, path: str | None, *, limit: int) -> list[Question] | None:
    """Return the first questions of a task's test split or, if there is none, of validation; None without either.

    Args:
        path: where its rows are; the task's own source if None.
        limit: most rows that are read; bad ones are dropped.

    Raises:
        ValueError: a file is damaged, or no path is given and the task has no source.
        ConnectionError: the Hub cannot be reached.
    """
    for split in ("test", "validation"):
        try:
            rows = task.load(split, path=path)
        except FileNotFoundError:
            continue
        return [example.question for example in read_examples(rows, on_bad_rows="drop", limit=limit)]
    return None


@dataclass(frozen=True)
class ShownRow:
    """A row as a stage trains it, as texts with their special tokens.

    Attributes:
        prompt: the text before the blocks.
        readouts: the text after each block; of methods without readouts by block, the parts of what is written.
        answer: the readout of the answer.
        in_place: what the memory tokens of each block predict, of methods whose memory tokens predict something.
    """

    prompt: str
    readouts: list[str]
    answer: str
    in_place: list[str]


def show_rows(rows: Dataset, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> list[ShownRow]:
    """Return the first three tokenised rows as a stage trains them."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return [
        ShownRow(
            text(row["prompt_ids"]),
            [text(ids) for ids in objective.readouts(row)],
            text(row["answer_ids"]),
            [text(list(ids)) for ids in objective.in_place(row)],
        )
        for row in rows.select(range(min(3, len(rows))))
    ]


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of rows and a SHA-256 of their contents in order, independent of the file format.

    >>> fingerprint([{"answer": "7", "question": "1 + 6?"}])["num_rows"]
    1
    """
    digest, count = hashlib.sha256(), 0
    for row in rows:
        # Chats without tools and variables have the fingerprint that they had before there were these columns.
        row = {name: value for name, value in row.items() if value is not None or name not in CHAT_COLUMNS}
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        count += 1
    return {"num_rows": count, "sha256": digest.hexdigest()}


def _hold_out(train: Dataset, options: DataOptions) -> tuple[Dataset, Dataset]:
    try:
        return hold_out(train, options.validation_rows)
    except ValueError as error:
        raise ValueError(
            f"data.validation_rows: must leave rows to train on in split {options.train_split!r} with {len(train)} "
            f"rows, got {options.validation_rows}. Give a smaller number. ({error})"
        ) from error
