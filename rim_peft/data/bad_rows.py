"""Bad rows: what is wrong with them, and the checks of their texts."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")
_BLANK = {"\u034f", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u2800", "\u3164", "\uffa0"} | {
    chr(code) for codes in (range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0)) for code in codes
}
"""Invisible characters: Unicode categories (``_UNSEEN``), and further blanks, fillers and variation selectors."""

ROW_ERROR = "row_error"
"""Column with the reason why a loaded row could not be read; None in a good row."""

SHOWN_ROWS = 10
"""How many bad rows an error or a log lists one by one."""


class RowError(ValueError):
    """A bad row; the message names the field, the rule and the value found."""


class QuestionError(RowError):
    """A question that cannot be used.

    Attributes:
        index: its index among the questions.
        reason: what is wrong with it.
        name: name of the questions in the message.
    """

    def __init__(self, index: int, reason: str, name: str = "questions") -> None:
        self.index, self.reason, self.name = index, reason, name
        super().__init__(f"{name}[{index}]: {reason}")

    def __reduce__(self) -> tuple[type[QuestionError], tuple[int, str, str]]:
        """Pickle the parts, not the message."""
        return type(self), (self.index, self.reason, self.name)


class BadRowsError(ValueError):
    """Rows that cannot be trained on; ``rows`` holds the index and reason of each."""

    def __init__(self, rows: Sequence[tuple[int, str]]) -> None:
        self.rows = list(rows)
        count = "1 bad row" if len(self.rows) == 1 else f"{len(self.rows)} bad rows"
        remedy = "Correct the data, or drop such rows with on_bad_rows='drop' if others remain."
        super().__init__("\n".join([f"dataset: {count}.", *list_rows(self.rows), remedy]))

    def __reduce__(self) -> tuple[type[BadRowsError], tuple[list[tuple[int, str]]]]:
        """Pickle the rows, not the message."""
        return type(self), (self.rows,)


def list_rows(rows: Sequence[tuple[int, str]]) -> list[str]:
    """Return a line for each of the first ``SHOWN_ROWS`` rows, and one that counts the rest."""
    lines = [f"  row {index}: {reason}" for index, reason in rows[:SHOWN_ROWS]]
    return [*lines, f"  and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else lines


def log_dropped(rows: Sequence[tuple[int, str]], num_read: int) -> None:
    """Log the first ``SHOWN_ROWS`` of the rows that were dropped, and how many of those read they are."""
    for index, reason in rows[:SHOWN_ROWS]:
        logger.warning("dropped row %d: %s", index, reason)
    if rows:
        logger.warning("dropped %d of %d rows.", len(rows), num_read)


def check_text(name: str, text: object) -> None:
    """Check that a field is a text with content that UTF-8 can encode.

    Raises:
        RowError: it is not.
    """
    if not isinstance(text, str):
        raise RowError(f"{name}: must be a text, got {show(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a character (U+{ord(text[error.start]):04X}) at {error.start}"
        raise RowError(f"{name}: must be a text that UTF-8 can encode, got {half}") from None
    if not has_content(text):
        raise RowError(f"{name}: is empty")


def has_content(text: str) -> bool:
    """Tell whether a text has a visible character: white space, controls and zero-width characters do not count.

    >>> has_content(" ?"), has_content("\u200b\ufeff\ufe0f ")
    (True, False)
    """
    return any(unicodedata.category(char) not in _UNSEEN and char not in _BLANK for char in text)


def show(value: object) -> str:
    """Return a value as errors show it: cut, with its type."""
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
