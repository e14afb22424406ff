"""Questions for a model, read from text and JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rim_peft.data.chats import CALLS, CHAT_COLUMNS, Chat
from rim_peft.data.examples import RowError
from rim_peft.data.lines import parse_object, read_lines


def _question_of(fields: Mapping[str, Any]) -> Any:
    """Return the question of a JSON object, checked later; a chat has what the object says for its template."""
    question = fields.get("question", fields.get("messages"))
    is_begun = fields.get("continue_final_message") or False
    if not isinstance(is_begun, bool):
        raise RowError(f"continue_final_message: must be true or false, got {is_begun!r}")
    if not isinstance(question, list):
        if is_begun:
            raise RowError("continue_final_message: must be omitted for a question that is no list of chat messages")
        return question
    last = question[-1] if question else None
    if "question" not in fields:
        if isinstance(last, Mapping) and last.get("role") == "assistant" and not is_begun:
            question = question[:-1]
        question = [_plain_message(message) for message in question]
    given = {name: fields[name] for name in CHAT_COLUMNS if fields.get(name)}
    return Chat(question, continue_final_message=is_begun, **given) if given or is_begun else question


def _plain_message(message: Any) -> Any:
    """Return the parts of a message that training reads; what is no message is refused later."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) or any(map(message.get, CALLS)):
        return message
    return {"role": message["role"], "content": message["content"]}


class Asked(NamedTuple):
    """A question of a stream: its line number, the question, and why the line could not be read."""

    number: int
    question: Any
    problem: str | None


def read_asked(raw: Iterable[bytes]) -> Iterator[Asked]:
    """Yield the question of each non-blank line: its text, or the field ``question`` or ``messages`` of a JSON object.

    Messages that end with the assistant's are a row with its answer, which is not part of the question, unless
    ``continue_final_message`` is true: then it is a begun answer.

    >>> [asked.question for asked in read_asked([b"1 + 1?", b"", b'{"question": "2 + 2?", "id": 7}'])]
    ['1 + 1?', '2 + 2?']
    """
    for number, line, problem in read_lines(raw):
        text = line.strip()
        if problem is not None or not text.startswith("{"):
            if text or problem is not None:
                yield Asked(number, text, problem)
            continue
        try:
            fields = parse_object(text)
            has_question = "question" in fields or "messages" in fields
            missing = None if has_question else f"must have a field question or messages, got {text[:60]!r}"
            yield Asked(number, _question_of(fields) if has_question else None, missing)
        except RowError as error:
            yield Asked(number, None, f"{error}. Write one JSON object per line")
