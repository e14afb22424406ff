"""Questions on stdin."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from rim_peft.cli.generate import _as_utf8, answer_fit, read_questions
from rim_peft.data.examples import QuestionError, RowError, check_question
from rim_peft.data.questions import read_asked


def test_lines_are_questions_or_json() -> None:
    chat = b'{"question": [{"role": "user", "content": "c?"}]}'
    questions = read_questions([b"a?\n", b" \n", b'{"question": "b?", "id": 3}\n', chat], "stdin")
    assert questions == ["a?", "b?", [{"role": "user", "content": "c?"}]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": ', "stdin line 2: not valid JSON"),
        (b'{"prompt": "a?"}', "stdin line 2: must have a field question or messages, got"),
        (b"\xff", "stdin line 2: not valid UTF-8"),
    ],
)
def test_bad_lines_are_named(line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions([b"a?", line], "stdin")


def test_an_unfit_question_leaves_the_others_of_its_batch(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(questions: Sequence[Any]) -> list[str]:
        for index, question in enumerate(questions):
            if not isinstance(question, str):
                raise QuestionError(index, f"must be a text, got {question}")
        return [question.upper() for question in questions]

    batch = list(read_asked([b"a", b'{"question": 5}', b"{", b"b", b'{"question": 6}']))
    assert answer_fit(batch, answer) == [("a", "A"), ("b", "B")]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("rim-peft: stdin line 3: not valid JSON")
    end = "It is left unanswered."
    assert lines[1:] == [f"rim-peft: stdin line {n}: must be a text, got {v}. {end}" for n, v in ((2, 5), (5, 6))]


def test_an_argument_is_read_as_utf8_whatever_the_locale() -> None:
    assert _as_utf8("\udcc3\udca9?") == _as_utf8("\u00e9?") == "\u00e9?"
    assert _as_utf8("\ud83d") == "\ud83d"  # which the question's check names


USER = {"role": "user", "content": "c?"}
ANSWER = {"role": "assistant", "content": "d", "reasoning_content": "e"}


def question_of(fields: dict[str, Any]) -> Any:
    (asked,) = read_asked([json.dumps(fields).encode()])
    assert asked.problem is None
    return asked.question


def test_conversations_are_asked_for_their_last_answer() -> None:
    turns = [USER, {"role": "assistant", "content": "d"}, USER]
    assert question_of({"messages": [USER, ANSWER, USER]}) == turns
    assert question_of({"messages": [USER, ANSWER, USER, ANSWER]}) == turns  # a row of a training
    assert question_of({"question": "q", "messages": [USER]}) == "q"


def test_chats_come_with_what_their_template_gets() -> None:
    beside = {"tools": [{"name": "add"}], "chat_template_kwargs": {"enable_thinking": False}}
    for name in ("question", "messages"):
        chat = question_of({name: [USER], **beside})
        assert (list(chat), chat.tools, chat.chat_template_kwargs) == ([USER], *beside.values())


def test_a_begun_answer_is_asked_for() -> None:
    chat = question_of({"messages": [USER, ANSWER], "continue_final_message": True})
    assert (chat.begun, chat.asked) == ("d", [USER])
    assert check_question(chat) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [USER], "continue_final_message": "yes"}, "continue_final_message: must be true or false, got"),
        (
            {"question": "1 + 1?", "continue_final_message": True},
            "continue_final_message: must be omitted for a question",
        ),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "chat_template_kwargs: must be a mapping"),
        ({"messages": [USER], "tools": "add"}, "tools: must be a list of JSON schemas"),
    ],
)
def test_bad_conversations_are_named(fields: dict[str, Any], message: str) -> None:
    (asked,) = read_asked([json.dumps(fields).encode()])
    assert asked.problem is not None
    assert asked.problem.startswith(message)


@pytest.mark.parametrize("messages", ["text", [], [ANSWER], [USER, "x"], [USER, {**ANSWER, "tool_calls": [{}]}, USER]])
def test_what_is_no_conversation_is_refused_when_it_is_asked(messages: Any) -> None:
    question = question_of({"messages": messages})
    if messages == "text":
        assert question == "text"
        return
    with pytest.raises(RowError, match="question"):
        check_question(question)
