"""Training examples: their fields, the rows accepted as one, and the templates that write them as text."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")
_BLANK = {"\u034f", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u2800", "\u3164", "\uffa0"} | {
    chr(code) for codes in (range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0)) for code in codes
}
"""Invisible characters: Unicode categories (``_UNSEEN``), and further blanks, fillers and variation selectors."""

Question: TypeAlias = str | Sequence[Mapping[str, str]]
"""A text, or a list of chat messages with ``role`` and ``content``."""

ROLES = ("system", "user", "assistant")

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


@dataclass(frozen=True)
class Example:
    """A question, its explicit reasoning steps, and its answer.

    >>> Example("What is 2 * 3 + 1?", answer="7", steps=("2*3=6", "6+1=7")).steps
    ('2*3=6', '6+1=7')

    Attributes:
        question: a text, or chat messages with ``role`` and ``content``; the last one must be the user's.
        answer: the final answer.
        steps: the reasoning steps in order; None if there are none, which suffices for stage 2.

    Raises:
        RowError: a text is missing, empty or of the wrong type; or the messages are not a chat that ends with the user.
    """

    question: Question
    answer: str
    steps: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_question(self.question)
        _check_text("answer", self.answer)
        for index, step in enumerate(self.steps or ()):
            _check_text(f"steps[{index}]", step)


def read_example(row: Mapping[str, Any]) -> Example:
    """Read a row with the fields ``question``, ``answer`` and, optionally, ``steps``.

    >>> read_example({"question": "1 + 1?", "steps": [], "answer": "2", "id": 7})
    Example(question='1 + 1?', answer='2', steps=None)

    Raises:
        RowError: a field is missing, empty or of the wrong type.
    """
    if (problem := row.get(ROW_ERROR)) is not None:
        raise RowError(problem)
    steps = row.get("steps")
    if steps is not None and (isinstance(steps, str) or not isinstance(steps, Sequence)):
        raise RowError(f"steps: must be a list of texts, got {_show(steps)}")
    question = require_field(row, "question")
    if isinstance(question, Sequence) and not isinstance(question, str):
        _check_messages(question)
        # A table gives every message the keys of all messages; only these two belong to the chat.
        question = [{"role": message["role"], "content": message["content"]} for message in question]
    return Example(question, answer=require_field(row, "answer"), steps=tuple(steps) if steps else None)


def require_field(row: Mapping[str, Any], name: str) -> Any:
    """Return a row's field.

    Raises:
        RowError: there is none; lists the row's fields.
    """
    if name not in row:
        there = ", ".join(str(key) for key in row if key != ROW_ERROR)
        raise RowError(f"{name}: the row has no such field; its fields: {there or 'none'}")
    return row[name]


def check_question(question: object) -> None:
    """Check that a question is a text, or a chat that ends with the user.

    Raises:
        RowError: it is empty, of the wrong type, or has an invalid message.
    """
    if isinstance(question, str):
        _check_text("question", question)
    else:
        _check_messages(question)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RowError(f"{name}: must be a text, got {_show(text)}")
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


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence):
        raise RowError(f"question: must be a text or a list of chat messages, got {_show(messages)}")
    if not messages:
        raise RowError("question: is empty")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RowError(f"question[{index}]: must be a message with role and content, got {_show(message)}")
        if message["role"] not in ROLES:
            raise RowError(f"question[{index}].role: must be one of {', '.join(ROLES)}, got {_show(message['role'])}")
        _check_text(f"question[{index}].content", message["content"])
    if messages[-1]["role"] != "user":
        raise RowError(f"question: the last message must be the user's, got one of {messages[-1]['role']}")


def _show(value: object) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


@dataclass(frozen=True)
class Templates:
    """Templates for the parts of an example; each holds the name of its part in braces.

    A question of chat messages is written with the tokenizer's chat template instead of ``prompt``.

    >>> Templates(answer="The answer is {answer}.").answer.format(answer="7")
    'The answer is 7.'

    Attributes:
        prompt: the text before the blocks.
        step: the readout of a reasoning step; EOS is added.
        answer: the readout of the answer; EOS is added.
        separator: the text after each step when steps and answer are written as one text (a chain of thought).
        allow_special_tokens: whether special tokens spelt in a question, a step or an answer are read as special
            tokens, not as text. Those in the templates always are.

    Raises:
        ValueError: a template does not hold its placeholder exactly once, or holds another placeholder.
    """

    prompt: str = "{question}\n"
    step: str = "{step}"
    answer: str = "{answer}"
    separator: str = "\n"
    allow_special_tokens: bool = False

    def __post_init__(self) -> None:
        for name, placeholder in (("prompt", "question"), ("step", "step"), ("answer", "answer")):
            _check_template(name, getattr(self, name), placeholder)


def _check_template(name: str, template: object, placeholder: str) -> None:
    rule = f"must hold {{{placeholder}}} once and no other placeholder, got {template!r}"
    remedy = "Write a literal brace twice."
    if not isinstance(template, str):
        raise ValueError(f"{name} template: {rule}. Give a text.")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{name} template: {rule} ({error}). {remedy}") from None
    found = [(part, spec, conversion) for _, part, spec, conversion in parts if part is not None]
    if found != [(placeholder, "", None)]:
        raise ValueError(f"{name} template: {rule}. {remedy}")
