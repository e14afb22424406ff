"""Questions on stdin."""

import pytest

from rim_peft.cli.generate import read_questions


def test_lines_are_questions_or_json() -> None:
    chat = '{"question": [{"role": "user", "content": "c?"}]}'
    questions = list(read_questions(["a?\n", " \n", '{"question": "b?", "id": 3}\n', chat]))
    assert questions == ["a?", "b?", [{"role": "user", "content": "c?"}]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": ', "stdin line 2: not valid JSON"),
        ('{"prompt": "a?"}', "stdin line 2: must have a field question, got"),
    ],
)
def test_bad_lines_are_named(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_questions(["a?", line]))
