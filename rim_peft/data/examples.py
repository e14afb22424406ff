"""Training examples: their fields, the rows accepted as one, and the templates that write them as text."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rim_peft.data.bad_rows import (
    ROW_ERROR,
    SHOWN_ROWS,
    BadRowsError,
    QuestionError,
    RowError,
    check_text,
    has_content,
    list_rows,
    log_dropped,
    show,
)
from rim_peft.data.chats import CHAT_COLUMNS, ROLES, Chat, Question, begun_of, check_messages, read_template_variables

__all__ = [
    "ROLES",
    "ROW_ERROR",
    "SHOWN_ROWS",
    "BadRowsError",
    "Example",
    "Question",
    "QuestionError",
    "RowError",
    "Templates",
    "check_question",
    "has_content",
    "list_rows",
    "log_dropped",
    "read_example",
    "require_field",
]


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
        if begun_of(self.question):
            raise RowError("question: must end with the user's message in an example, whose answer is not begun")
        check_text("answer", self.answer)
        for index, step in enumerate(self.steps or ()):
            check_text(f"steps[{index}]", step)


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
        raise RowError(f"steps: must be a list of texts, got {show(steps)}")
    question = require_field(row, "question")
    if isinstance(question, Sequence) and not isinstance(question, str):
        check_messages(question)
        # A table gives every message the keys of all messages; only these two belong to the chat.
        messages = [{"role": message["role"], "content": message["content"]} for message in question]
        tools, variables = (row.get(name, getattr(question, name, None)) for name in CHAT_COLUMNS)
        chat = Chat(messages, tools=tools, chat_template_kwargs=variables)
        question = chat if chat.tools or chat.chat_template_kwargs else messages
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
        check_text("question", question)
    else:
        check_messages(question)


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
        chat_template_kwargs: variables of the chat template, such as ``{"enable_thinking": False}``; those of a
            :class:`Chat` come first.

    Raises:
        ValueError: a template does not hold its placeholder exactly once, or holds another placeholder, or
            ``chat_template_kwargs`` is no mapping of the chat template's variables.
    """

    prompt: str = "{question}\n"
    step: str = "{step}"
    answer: str = "{answer}"
    separator: str = "\n"
    allow_special_tokens: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "chat_template_kwargs", read_template_variables(self.chat_template_kwargs))
        except RowError as error:
            raise ValueError(f"{error}.") from None
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
