"""Fields of rows in the several forms in which they are published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from rim_peft.data.examples import RowError, has_content, require_field
from rim_peft.data.tasks.sentences import split_sentences


def require_one_of(row: Mapping[str, Any], *names: str) -> Any:
    """Return the first of several fields that a row has.

    Raises:
        RowError: it has none of them; names the fields that there are.
    """
    name = next((name for name in names if name in row), None)
    return require_field(row, " or ".join(names)) if name is None else row[name]


def require_text(row: Mapping[str, Any], *names: str) -> str:
    """Return the first of several fields that a row has, a text.

    Raises:
        RowError: it has none of them, or it is empty or no text.
    """
    value = require_one_of(row, *names)
    if not isinstance(value, str) or not has_content(value):
        raise RowError(f"{' or '.join(names)}: must be a text that is not empty, got {value!r}")
    return value.strip()


def require_number(row: Mapping[str, Any], *names: str) -> str:
    """Return the first of several fields that a row has, a number, as a plain decimal text without an exponent.

    A float is written with the digits that tell it from its neighbours, so its value does not change.

    >>> [require_number({"target": value}, "target") for value in (51.0, -2.0107e-06, "1,050.0")]
    ['51', '-0.0000020107', '1050']

    Raises:
        RowError: it has none of them, or it is no finite number.
    """
    value = require_one_of(row, *names)
    rule = f"{' or '.join(names)}: must be a number, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RowError(rule)
    try:
        number = Decimal(repr(value) if not isinstance(value, str) else value.replace(",", "").strip())
    except InvalidOperation:
        raise RowError(rule) from None
    if not number.is_finite() or not math.isfinite(float(number)) or (number and not float(number)):
        raise RowError(rule)  # none, or written without an exponent longer than any answer
    text = f"{number:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) if number else "0"


def read_texts(row: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """Return a field that holds a list of texts, or one text, whose sentences count; None if it is absent or empty.

    Raises:
        RowError: it holds something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        value = split_sentences(value)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise RowError(f"{name}: must be a text or a list of texts, got {value!r}")
    return tuple(item.strip() for item in value if item.strip()) or None
