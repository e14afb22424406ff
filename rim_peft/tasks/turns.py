"""Turns of a conversation: which are the assistant's, which are to be trained on, and which answer can be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rim_peft.data.chats import check_calls
from rim_peft.data.examples import RowError

_MARKS = ("weight", "train", "training")
"""Parts of a chat message that say whether it is trained on: OpenAI's, which is 0 or 1, and those of axolotl."""

_PARTIAL = ("train_detail", "training_detail")
"""Parts of a chat message that say so of parts of its text, for axolotl."""


def assistant_turns(messages: Sequence[Any]) -> list[int]:
    """Return the indices of the assistant's messages; a greeting before the user's first message answers nothing."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    start = roles.index("user") if "user" in roles else len(roles)
    return [index for index in range(start, len(roles)) if roles[index] == "assistant"]


def is_left_out(message: Any) -> bool:
    """Tell whether a turn of the assistant says that it is not to be trained on."""
    is_own = isinstance(message, Mapping) and message.get("role") == "assistant"
    return is_own and any(message.get(name) is not None and message[name] == 0 for name in _MARKS)


def check_answer(messages: Sequence[Mapping[str, Any]], *, is_conversation: bool) -> None:
    """Check that messages end with, or are, one answer to be trained on."""
    rule = "answer: must be one message of the assistant after the question"
    if is_conversation and not assistant_turns(messages):
        raise RowError(f"{rule}, but the conversation has none")
    roles = [message.get("role") for message in messages]
    num_asked = max((index + 1 for index, role in enumerate(roles) if role in ("system", "user")), default=0)
    for message in messages[num_asked:]:
        check_calls("answer", message)
    if len(roles) - num_asked > 1:
        listed = ", ".join(map(str, roles[num_asked:]))
        raise RowError(f"{rule}, since answers of several messages are not read, got {listed}")
    if roles[-1] != "assistant" or (len(roles) > 1 and not is_conversation):
        raise RowError(f"{rule}, got {messages[-1]!r}")
    _check_marks(messages[-1])


def _check_marks(message: Mapping[str, Any]) -> None:
    """Check that a turn is to be trained on, as a whole."""
    for name in _MARKS:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise RowError(f"answer.{name}: must be 0 or 1, or false or true, got {value!r}")
        if value == 0:
            raise RowError(
                f"answer.{name}: is {value!r}, so this turn is not trained on. To train on the other turns of the "
                "conversation, set data.options.turns=all"
            )
    for name in _PARTIAL:
        if message.get(name):
            raise RowError(f"answer.{name}: must be empty, since an answer is trained on as a whole")


def count_continuing(chats: Iterable[list[str]]) -> int:
    """Count chats that begin with the whole of another one.

    >>> count_continuing([["a"], ["a", "b", "c"], ["d", "e", "c"]])
    1
    """
    chats = list(chats)
    whole = {tuple(chat) for chat in chats}
    return sum(any(tuple(chat[:end]) in whole for end in range(1, len(chat))) for chat in chats)
