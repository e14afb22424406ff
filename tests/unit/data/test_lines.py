"""What files and streams hold, read line by line: nothing but the line itself suffers from what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.examples import RowError
from rim_peft.data.lines import parse_object, read_lines
from rim_peft.data.questions import read_asked
from rim_peft.tasks import get_task

GOOD = {"question": "1 + 1?", "answer": "2", "steps": ["1+1=2"]}
TEXT = json.dumps(GOOD)


def load_errors(path: Path, task: str = "prosqa", **options: Any) -> list[str | None]:
    return [row["row_error"] for row in get_task(task).load("test", path=str(path), **options)]


def test_lines_end_at_newlines_alone() -> None:
    raw = [b"\xef\xbb\xbfa\rb\r\n", "c\u2028d\x0c\x1ee\n".encode(), b"\xef\xbb\xbf\xef\xbb\xbff", b"\xff\n"]
    lines = list(read_lines(raw))
    assert [line.text for line in lines[:3]] == ["a\rb", "c\u2028d\x0c\x1ee", "f"]
    assert [line.number for line in lines] == [1, 2, 3, 4]
    assert lines[3].problem == "not valid UTF-8 (byte 0xff at 0)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a', "not valid JSON: it breaks off at character 13, in"),
        ('{"question": "a\rb"}', "not valid JSON: it breaks off at character 15"),
        ('{"question": "a\x00b"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON: it nests too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "not valid JSON: a number has thousands of digits"),
        ('{"question": "a", "question": "b"}', "an object has the key 'question' twice"),
        ("[1]", r"must be a JSON object with fields, got '\[1\]'"),
        ("5", "must be a JSON object with fields, got '5'"),
        ("null", "must be a JSON object with fields"),
    ],
)
def test_what_is_no_object_is_named(text: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_object(text)


BAD_LINES = [
    (b'{"question": "\\ud83d", "answer": "2"}', r"question: must be a text that UTF-8 can encode, got half .*U\+D83D"),
    (b'{"question": "a", "answer": "\\udc00"}', "answer: must be a text that UTF-8 can encode"),
    (b'{"question": "\xff", "answer": "2"}', "not valid UTF-8"),
    (b'{"question": "\\u200b\\ufeff\\ufe0f\\u00a0", "answer": "2"}', "question: is empty"),
    (b'{"question": "a\rb", "answer": "2"}', "not valid JSON"),
    (b'{"question": "a", "answer": NaN}', "answer: must be a text, got nan"),
    (b'{"\\ud83d": "a", "answer": "2"}', "question: the row has no such field"),
    (b'["question"]', "must be a JSON object with fields"),
    (b"[" * 20_000, "nests too deeply"),
    (b'{"answer": ' + b"1" * 5000 + b"}", "a number has thousands of digits"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_line_that_cannot_be_read_is_one_bad_row(tmp_path: Path, line: bytes, reason: str, streaming: bool) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes(b"\n".join([TEXT.encode(), b"", line, b"\xef\xbb\xbf" + TEXT.encode() + b"\r"]))
    first, bad, last = load_errors(path, streaming=streaming)
    assert first is last is None
    assert bad is not None
    assert bad.startswith("test.jsonl line 3: ")
    with pytest.raises(RowError, match=reason):
        raise RowError(bad)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_json_document_are_bad_one_by_one(tmp_path: Path, streaming: bool) -> None:
    bad = [b'{"question": "\xff", "answer": "2"}', b'{"question": "\\ud83d", "answer": "2"}', b"7"]
    bad.append(b'{"question": "a", "answer": "2", "answer": "3"}')
    (tmp_path / "test.json").write_bytes(b"[" + b",\n".join([TEXT.encode(), *bad, TEXT.encode()]) + b"]")
    errors = load_errors(tmp_path, streaming=streaming)
    assert [error is None for error in errors] == [True, False, False, False, False, True]
    assert errors[4] == "test.json item 4: not valid JSON: an object has the key 'answer' twice"


def test_a_line_of_text_is_a_row_whatever_it_holds(tmp_path: Path) -> None:
    good = "Two?||<<1+1=2>> #### 2"
    lines = [b"\xef\xbb\xbf" + good.encode(), b"a\rb||#### 2", "c\u2028d||#### 3".encode(), b"\xff||#### 2", b"none"]
    (tmp_path / "test.txt").write_bytes(b"\r\n".join(lines))
    rows = list(get_task("gsm8k-aug").load("test", path=str(tmp_path / "test.txt")))
    assert [row["question"] for row in rows[:3]] == ["Two?", "a\rb", "c\u2028d"]
    assert rows[3]["row_error"] == "test.txt line 4: not valid UTF-8 (byte 0xff at 0)"
    assert rows[4]["row_error"].startswith("test.txt line 5: must read 'question||<<..>> #### answer'")


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k-aug", "logiqa", "prosqa", "strategyqa", "svamp", "math", "gsm-hard"])
@pytest.mark.parametrize("value", [5, None, ["a"], {"a": 1}, True, "²", "1e-999999999"])
def test_fields_of_other_types_are_bad_rows(tmp_path: Path, task: str, value: Any) -> None:
    names = (
        "text",
        "question",
        "answer",
        "context",
        "options",
        "facts",
        "Body",
        "Answer",
        "input",
        "target",
        "problem",
    )
    lines = [{name: value} for name in names] + [{**dict.fromkeys(names, "x"), name: value} for name in names]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, {"solution": value, "problem": "x"}])), encoding="utf-8")
    errors = load_errors(path, task)
    assert len(errors) == len(lines) + 1
    assert not [error for error in errors if error is not None and "Error:" in error]


def test_a_reader_that_fails_makes_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task("prosqa")

    def read(self: Any, row: Any) -> Any:
        return row["absent"]

    monkeypatch.setattr(type(task), "read_row", read)
    (tmp_path / "test.jsonl").write_text(TEXT, encoding="utf-8")
    (error,) = (row["row_error"] for row in task.load("test", path=str(tmp_path / "test.jsonl")))
    assert error == "test.jsonl line 1: task 'prosqa' cannot read the row: KeyError: 'absent'"


def test_questions_of_a_stream() -> None:
    lines = [b"\xef\xbb\xbf" + b'{"question": "a?"}\r\n', b" \n", b"b?\n", b"{\n", b"\xff\n", b'{"id": 1}']
    asked = list(read_asked(lines))
    assert [(item.number, item.question) for item in asked if item.problem is None] == [(1, "a?"), (3, "b?")]
    assert [item.number for item in asked if item.problem is not None] == [4, 5, 6]
