"""A source's rows → rows with question, steps and answer, or with what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rim_peft.data.examples import ROW_ERROR, RowError
from rim_peft.data.files import JSON_COLUMN, Rows

if TYPE_CHECKING:
    from rim_peft.data.tasks.task import Task


def read_batch(batch: Mapping[str, Sequence[Any]], task: Task, is_chat: bool, source: str) -> dict[str, list[Any]]:
    """Read a batch of a source's rows; blank lines are no rows. For ``source`` see :func:`source_hash`."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    read = [_read_or_explain(row, task, is_chat=is_chat) for row in rows if not _is_blank(row)]
    return {name: [row[name] for row in read] for name in ("question", "steps", "answer", ROW_ERROR)}


def _read_or_explain(row: Mapping[str, Any], task: Task, *, is_chat: bool) -> dict[str, Any]:
    try:
        example = task.read_row(_parse(row))
        if isinstance(example.question, str) == is_chat:
            # A column has one type.
            raise RowError(f"question: must be {'chat messages' if is_chat else 'a text'} as in the first row")
    except RowError as error:
        return {"question": None, "steps": None, "answer": None, ROW_ERROR: str(error)}
    steps = list(example.steps) if example.steps else None
    return {"question": example.question, "steps": steps, "answer": example.answer, ROW_ERROR: None}


def _parse(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse the row of a JSON file; others are returned as they are."""
    if set(row) != {JSON_COLUMN}:
        return row
    text = row[JSON_COLUMN].removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON: {error}, in {text[:60]!r}") from None
    if not isinstance(value, dict):
        raise RowError(f"must be a JSON object with fields, got {text[:60]!r}")
    return value


def _is_blank(row: Mapping[str, Any]) -> bool:
    return len(row) == 1 and all(isinstance(value, str) and not value.strip() for value in row.values())


def has_chats(rows: Rows, task: Task, *, look_at: int = 100) -> bool:
    """Tell whether the questions are chat messages: whether that of the first row is that can be read."""
    for row in islice(rows, look_at):
        try:
            return not isinstance(task.read_row(_parse(row)).question, str)
        except RowError:
            continue
    return False
