"""Which columns of any rows hold question, steps and answer, and how a value in them is found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from datasets import ClassLabel, Value

from rim_peft.data.chats import CHAT_COLUMNS
from rim_peft.data.examples import has_content
from rim_peft.values import some_of

Columns: TypeAlias = Mapping[str, tuple[str, ...]]
"""The columns of each role; several are joined, none are ``()``."""

USUAL: Columns = {
    "question": ("question", "problem", "prompt", "instruction", "query", "messages"),
    "steps": ("steps", "solution", "rationale", "reasoning", "reasoning_content", "thinking", "completions"),
    "answer": ("answer", "output", "completion", "target", "label", "messages"),
}
"""Usual names of the columns of each role. ``instruction`` is joined with ``input``, and ``completions`` counts only
beside ``labels``, as in TRL's stepwise supervision."""

OWN: Columns = {role: (role,) for role in USUAL}
"""The columns of rows in this package's own form."""

INSTRUCTION = ("instruction", "input")
"""An instruction with its input, which rows may lack."""

KEY = "data.options.columns"
"""The recipe's key of the mapping, for messages."""

ABSENT: Any = object()
"""Returned by :func:`look_up` for a column or part that is not there."""


def check_columns(columns: Mapping[str, Any]) -> None:
    """Check the option ``columns``.

    Raises:
        ValueError: it has another role, or a value that names no column.
    """
    for role, names in columns.items():
        if role not in USUAL:
            raise ValueError(f"columns: must have keys among {', '.join(USUAL)}, got {role!r}.")
        texts = [names] if isinstance(names, str) else names
        is_named = isinstance(texts, list | tuple) and texts and all(isinstance(name, str) and name for name in texts)
        if not is_named or (role != "question" and not isinstance(names, str)):
            kind = "a column, or a list of columns to join" if role == "question" else "a column"
            raise ValueError(f"columns.{role}: must be {kind}, got {names!r}.")


def choose_columns(rows: Sequence[Mapping[str, Any]], given: Mapping[str, Any], *, may_lack_answer: bool) -> Columns:
    """Choose the columns of each role: those given, else the ones with usual names; of several, the one with values.

    Rows with all of ``question``, ``steps`` and ``answer`` are read by these names, whatever other columns they have.

    >>> rows = [{"problem": "1 + 1?", "solution": "2", "answer": "2", "source": "me"}]
    >>> choose_columns(rows, {}, may_lack_answer=False)
    {'question': ('problem',), 'steps': ('solution',), 'answer': ('answer',)}

    Args:
        rows: rows to look at.
        given: the option ``columns``.
        may_lack_answer: whether the answer may be in the text of the steps.

    Raises:
        ValueError: two columns with values could have one role, a given column is not there, or no column is the
            question or the answer.
    """
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    filled = [name for name in names if any(is_filled(row.get(name)) for row in rows)]
    chosen: dict[str, tuple[str, ...]] = {}
    for role in USUAL:
        if role in given:
            chosen[role] = (given[role],) if isinstance(given[role], str) else tuple(given[role])
            _check_there(role, chosen[role], rows, names)
        elif all(own in names for own in USUAL):
            chosen[role] = (role,)
        else:
            chosen[role] = _guess(role, names, filled)
    if not chosen["question"]:
        raise ValueError(_none("question", names))
    is_stepwise = chosen["steps"] == ("completions",)
    if not chosen["answer"] and not is_stepwise and not (may_lack_answer and chosen["steps"]):
        elsewhere = " If it is in another text, name its column, and data.options.answer_from."
        raise ValueError(_none("answer", names) + elsewhere)
    return chosen


def unread(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """Return the columns with values that have no role, as a text; "" if there are none.

    >>> rows = [{"context": "1 + 1 = 2", "question": "1 + 1?", "answer": "2", "hint": ""}]
    >>> unread(rows, choose_columns(rows, {}, may_lack_answer=False))
    'context'
    """
    paths = [path for names in columns.values() for path in names]
    read = {*paths, *(path.split(".")[0] for path in paths), *CHAT_COLUMNS}
    if "completions" in columns["steps"]:
        read.add("labels")
    names = dict.fromkeys(str(name) for row in rows for name in row if is_filled(row[name]))
    return some_of([name for name in names if name not in read], 12)


def _guess(role: str, names: Sequence[str], filled: Sequence[str]) -> tuple[str, ...]:
    usual = [name for name in USUAL[role] if name in names and (name != "completions" or "labels" in names)]
    candidates = [name for name in usual if name in filled]
    if not candidates and len(usual) == 1:  # later rows may have it
        candidates = usual
    if len(candidates) > 1:
        listed = " and ".join(repr(name) for name in candidates)
        raise ValueError(
            f"{KEY}.{role}: must be given, since the rows have {listed}. Choose one, as in "
            f"{KEY}.{role}={candidates[0]}."
        )
    if candidates == ["instruction"] and "input" in names:
        return INSTRUCTION
    return tuple(candidates)


def _check_there(role: str, columns: Iterable[str], rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for name in columns:
        if all(look_up(row, name) is ABSENT for row in rows):
            raise ValueError(
                f"{KEY}.{role}: must be a column of the rows, got {name!r}. They have: "
                f"{some_of(names, 30) or 'none'}. A dotted path names a part of one."
            )


def _none(role: str, names: Sequence[str]) -> str:
    return (
        f"{KEY}.{role}: must be given, since no column has a usual name ({', '.join(USUAL[role])}). The rows have: "
        f"{some_of(names, 30) or 'none'}. Choose one: {KEY}.{role}=COLUMN."
    )


def is_filled(value: Any) -> bool:
    """Tell whether a column, or a part of one, has a value: no empty text and no empty list."""
    return has_content(value) if isinstance(value, str) else value is not None and value != []


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """Return a column of a row, or a part of it by a dotted path; :data:`ABSENT` if there is none.

    A number is a place in a list, counted from the end if negative; a name means that part of every item.

    >>> row = {"a.b": 1, "chain": [{"text": "x"}, {"text": "y"}], "answers": {"text": ["z"]}}
    >>> [look_up(row, path) for path in ("a.b", "chain.text", "answers.text.0")]
    [1, ['x', 'y'], 'z']
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        value = _part_of(value, part)
    return value


def _part_of(value: Any, part: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return value.get(part, ABSENT)
    if not isinstance(value, list):
        return ABSENT
    if part.removeprefix("-").isdecimal():
        index = int(part)
        return value[index] if -len(value) <= index < len(value) else ABSENT
    parts = [_part_of(item, part) for item in value]
    # An item without the part keeps its place, so that it is reported.
    return ABSENT if parts and all(item is ABSENT for item in parts) else [None if p is ABSENT else p for p in parts]


def odd_cells(features: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the columns whose cells read otherwise than they were written: classes, and floats of few bits."""
    kinds = (features or {}).items()
    return {name: kind for name, kind in kinds if isinstance(kind, ClassLabel) or _is_short_float(kind)}


def write_cells(row: Mapping[str, Any], odd: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with the name of a class for its number, None for no class, and a short float's own digits.

    >>> kinds = odd_cells({"label": ClassLabel(names=["no", "yes"]), "score": Value("float32"), "n": Value("int64")})
    >>> write_cells({"label": 1, "score": 0.10000000149011612, "n": 3}, kinds)
    {'label': 'yes', 'score': 0.1, 'n': 3}

    Args:
        odd: the result of :func:`odd_cells`.
    """
    return {**row, **{name: _write(row[name], kind) for name, kind in odd.items() if name in row}} if odd else row


def _is_short_float(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("float16", "float32")


def _write(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if isinstance(kind, ClassLabel):
        return None if value == -1 else kind.int2str(value)  # -1: rows without labels, as in some test splits
    return float(str(np.dtype(kind.dtype).type(value)))
