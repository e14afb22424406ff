"""A source's rows → rows with question, steps and answer, or with what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rim_peft.data.examples import ROW_ERROR, Example, RowError
from rim_peft.data.files import Rows
from rim_peft.data.lines import JSON_COLUMN, ROW_PLACE, parse_object

if TYPE_CHECKING:
    from rim_peft.data.tasks.task import Task


def read_batch(batch: Mapping[str, Sequence[Any]], task: Task, is_chat: bool, source: str) -> dict[str, list[Any]]:
    """Read a batch of a source's rows; blank lines are no rows. For ``source`` see :func:`source_hash`."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    read = [_read_or_explain(row, task, is_chat=is_chat) for row in rows if not _is_blank(row)]
    return {name: [row[name] for row in read] for name in ("question", "steps", "answer", ROW_ERROR)}


def _read_or_explain(row: Mapping[str, Any], task: Task, *, is_chat: bool) -> dict[str, Any]:
    try:
        example = read_example_of(row, task)
        if isinstance(example.question, str) == is_chat:
            # A column has one type.
            raise RowError(f"question: must be {'chat messages' if is_chat else 'a text'} as in the first row")
    except RowError as error:
        place = f"{row[ROW_PLACE]}: " if row.get(ROW_PLACE) else ""
        return {"question": None, "steps": None, "answer": None, ROW_ERROR: place + _one_line(str(error))}
    steps = list(example.steps) if example.steps else None
    return {"question": example.question, "steps": steps, "answer": example.answer, ROW_ERROR: None}


def read_example_of(row: Mapping[str, Any], task: Task) -> Example:
    """Read a source's row through a task.

    Raises:
        RowError: it cannot be read, whatever the task's reader stumbles over.
    """
    try:
        return task.read_row(_parse(row))
    except RowError:
        raise
    except Exception as error:  # one row's fault must not end the load of the others
        raise RowError(f"task {task.name!r} cannot read the row: {type(error).__name__}: {error}") from error


def _parse(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse the row of a JSON file; others are returned as they are, without what their file's reader says of them."""
    if row.get(ROW_ERROR) is not None:
        raise RowError(str(row[ROW_ERROR]))
    if ROW_PLACE not in row:
        return row
    fields = {name: value for name, value in row.items() if name not in (ROW_PLACE, ROW_ERROR)}
    return parse_object(fields[JSON_COLUMN]) if set(fields) == {JSON_COLUMN} else fields


def _is_blank(row: Mapping[str, Any]) -> bool:
    """Tell whether a row is a line without anything in it."""
    values = [value for name, value in row.items() if name not in (ROW_PLACE, ROW_ERROR)]
    is_line = len(values) == 1 and isinstance(values[0], str) and row.get(ROW_ERROR) is None
    return is_line and not values[0].strip()


def _one_line(text: str, most: int = 400) -> str:
    """Return a reason as a text that a table and a terminal can hold."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def has_chats(rows: Rows, task: Task, *, look_at: int = 100) -> bool:
    """Tell whether the questions are chat messages: whether that of the first row is that can be read."""
    for row in islice(rows, look_at):
        try:
            return not isinstance(read_example_of(row, task).question, str)
        except RowError:
            continue
    return False
