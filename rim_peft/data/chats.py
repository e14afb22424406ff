"""Chats: messages, and what a chat template gets beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from rim_peft.data.bad_rows import RowError, check_text, show

Question: TypeAlias = str | Sequence[Mapping[str, str]]
"""A text, or a list of chat messages with ``role`` and ``content``."""

ROLES = ("system", "user", "assistant")

CALLS = ("tool_calls", "function_call")
"""Parts of a message that call tools."""

CHAT_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns of a row that its chat template gets beside the messages, named as in TRL; JSON texts in tables."""

RESERVED = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
"""Names of ``chat_template_kwargs`` that are not the template's: arguments of ``apply_chat_template``."""


class Chat(list[Mapping[str, str]]):
    """Chat messages with what the chat template gets beside them; without these, a plain list does.

    >>> chat = Chat([{"role": "user", "content": "1 + 1?"}], chat_template_kwargs={"enable_thinking": False})
    >>> len(chat), chat.with_messages([]).chat_template_kwargs
    (1, {'enable_thinking': False})

    Attributes:
        tools: JSON schemas of tools, for templates that use them.
        chat_template_kwargs: variables of the template, which come before those of :class:`Templates`.
        continue_final_message: whether the last message is the assistant's begun answer. The prompt ends before it, the
            blocks follow the prompt as in training, and the answer is what follows the begun text.

    Raises:
        RowError: the tools or the variables have another form.
    """

    def __init__(
        self,
        messages: Iterable[Mapping[str, str]],
        *,
        tools: object = None,
        chat_template_kwargs: object = None,
        continue_final_message: bool = False,
    ) -> None:
        super().__init__(messages)
        self.tools = _read_tools(tools)
        self.chat_template_kwargs = read_template_variables(chat_template_kwargs)
        self.continue_final_message = continue_final_message

    @property
    def begun(self) -> str:
        """The begun answer; empty without one."""
        return self[-1]["content"] if self.continue_final_message else ""

    @property
    def asked(self) -> list[Mapping[str, str]]:
        """The messages before the answer."""
        return self[:-1] if self.continue_final_message else self[:]

    def with_messages(self, messages: Iterable[Mapping[str, str]]) -> Chat:
        """Return other messages with the same tools and variables."""
        return Chat(messages, tools=self.tools, chat_template_kwargs=self.chat_template_kwargs)

    def columns(self) -> dict[str, str | None]:
        """Return a table's ``CHAT_COLUMNS``."""
        values = (self.tools, self.chat_template_kwargs)
        written = (json.dumps(value, ensure_ascii=False) if value else None for value in values)
        return dict(zip(CHAT_COLUMNS, written, strict=True))


def as_chat(question: Question) -> Chat:
    """Return a question of messages as a :class:`Chat`."""
    if isinstance(question, str):
        raise TypeError("question: must be chat messages, got a text.")
    return question if isinstance(question, Chat) else Chat(question)


def begun_of(question: Question) -> str:
    """Return the begun answer of a question; empty without one."""
    return question.begun if isinstance(question, Chat) else ""


def read_template_variables(value: object) -> dict[str, Any]:
    """Return ``chat_template_kwargs``, given as a mapping or its JSON text; keys without a value are not given.

    Raises:
        RowError: it is no mapping, has a name that is not the template's, or a value that JSON cannot hold.
    """
    found = _parsed(value)
    if not found and (found is None or isinstance(found, Mapping)):
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in found):
        raise RowError(
            "chat_template_kwargs: must be a mapping of the chat template's variables, such as "
            f"{{enable_thinking: false}}, got {show(found)}"
        )
    for name in found:
        if name in RESERVED:
            raise RowError(
                f"chat_template_kwargs.{name}: must be a variable of the chat template, but is an argument that this "
                "package sets. Omit it"
            )
    try:
        json.dumps(dict(found), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(
            f"chat_template_kwargs: must have values that JSON can hold, got {show(found)} ({error})"
        ) from None
    variables: dict[str, Any] = _without_nulls(found)
    return variables


def _read_tools(value: object) -> list[Mapping[str, Any]]:
    found = _parsed(value)
    if found is None or found == []:
        return []
    if (
        not isinstance(found, Sequence)
        or isinstance(found, str)
        or not all(isinstance(tool, Mapping) for tool in found)
    ):
        raise RowError(f"tools: must be a list of JSON schemas, one for each tool, got {show(found)}")
    tools: list[Mapping[str, Any]] = _without_nulls(list(found))
    return tools


def _parsed(value: object) -> object:
    """Return a value, parsed if it is a JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: Any) -> Any:
    """Omit keys without a value: a table gives every mapping the keys of all mappings."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def check_calls(place: str, message: object) -> None:
    """Check that a message neither calls a tool nor is what a tool returned.

    Raises:
        RowError: it does or is.
    """
    if not isinstance(message, Mapping):
        return
    for name in CALLS:
        if message.get(name):
            raise RowError(f"{place}.{name}: must be empty, since calls of tools are not read")
    if message.get("role") in ("tool", "function"):
        raise RowError(
            f"{place}.role: must be one of {', '.join(ROLES)}, since what tools return is not read, got "
            f"{message['role']!r}"
        )


def check_messages(messages: object) -> None:
    """Check that messages are a chat that ends with the user, or with a begun answer.

    Raises:
        RowError: they are not.
    """
    if not isinstance(messages, Sequence):
        raise RowError(f"question: must be a text or a list of chat messages, got {show(messages)}")
    if not messages:
        raise RowError("question: is empty")
    for index, message in enumerate(messages):
        check_calls(f"question[{index}]", message)
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RowError(f"question[{index}]: must be a message with role and content, got {show(message)}")
        if message["role"] not in ROLES:
            raise RowError(f"question[{index}].role: must be one of {', '.join(ROLES)}, got {show(message['role'])}")
        check_text(f"question[{index}].content", message["content"])
    is_begun = isinstance(messages, Chat) and messages.continue_final_message
    if is_begun and messages[-1]["role"] != "assistant":
        raise RowError(
            "question: the last message must be the assistant's with continue_final_message, got one of "
            f"{messages[-1]['role']}. Add the beginning of the answer, or omit continue_final_message"
        )
    asked = messages[:-1] if is_begun else messages
    if not asked or asked[-1]["role"] != "user":
        got = f"one of {asked[-1]['role']}" if asked else "none"
        raise RowError(f"question: the last message{' before a begun answer' * is_begun} must be the user's, got {got}")
