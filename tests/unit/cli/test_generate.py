"""Questions on stdin."""

from collections.abc import Sequence
from typing import Any

import pytest

from rim_peft.cli.generate import _as_utf8, answer_fit, read_questions
from rim_peft.data.examples import QuestionError
from rim_peft.data.lines import read_asked


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
