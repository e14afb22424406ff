import copy
from typing import Any

import pytest

from rim_peft.data.examples import BadRowsError, Example, RowError, Templates, read_example

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
GOOD: dict[str, Any] = {"question": "1 + 1?", "steps": ["1+1=2"], "answer": "2"}


def test_reads_texts_and_ignores_other_fields() -> None:
    assert read_example({**GOOD, "id": 3}) == Example("1 + 1?", answer="2", steps=("1+1=2",))


def test_reads_a_chat_without_the_keys_that_a_table_adds() -> None:
    chat = [{**message, "tool_calls": None} for message in CHAT]
    assert read_example({**GOOD, "question": chat}).question == CHAT


@pytest.mark.parametrize("row", [{"question": "q", "answer": "a"}, {**GOOD, "steps": None}, {**GOOD, "steps": []}])
def test_steps_may_be_absent(row: dict[str, Any]) -> None:
    assert read_example(row).steps is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, r"question: must be a text or a list of chat messages, got None"),
        ({"question": 7}, r"question: must be a text or a list of chat messages, got 7 \(int\)"),
        ({"question": " \n"}, "question: is empty"),
        ({"question": []}, "question: is empty"),
        ({"question": ["hello"]}, r"question\[0\]: must be a message with role and content, got 'hello'"),
        ({"question": [{"role": "user"}]}, r"question\[0\]: must be a message with role and content"),
        (
            {"question": [{"role": "cook", "content": "x"}]},
            r"question\[0\].role: must be one of system, user, assistant",
        ),
        ({"question": [{"role": "user", "content": ""}]}, r"question\[0\].content: is empty"),
        ({"question": [*CHAT, {"role": "assistant", "content": "2"}]}, "the last message must be the user's"),
        ({"answer": None}, "answer: must be a text, got None"),
        ({"answer": 2}, r"answer: must be a text, got 2 \(int\)"),
        ({"answer": "  "}, "answer: is empty"),
        ({"steps": "1+1=2"}, "steps: must be a list of texts, got '1[+]1=2'"),
        ({"steps": ["1+1=2", ""]}, r"steps\[1\]: is empty"),
        ({"steps": ["1+1=2", None]}, r"steps\[1\]: must be a text, got None"),
    ],
)
def test_names_field_and_value_of_a_bad_row(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_example({**GOOD, **change})


@pytest.mark.parametrize("field", ["question", "answer"])
def test_names_a_missing_field_and_those_there_are(field: str) -> None:
    row = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(RowError, match=rf"{field}: the row has no such field; its fields: {', '.join(row)}"):
        read_example(row)


def test_repeats_why_a_loaded_row_could_not_be_read() -> None:
    with pytest.raises(RowError, match="answer: no number"):
        read_example({"question": None, "steps": None, "answer": None, "row_error": "answer: no number"})


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(RowError, match=r"got \['y{55}\.\.\. \(list\)$"):
        read_example({**GOOD, "answer": ["y" * 500]})


def test_a_template_may_hold_literal_braces() -> None:
    assert Templates(answer="{{{answer}}}").answer.format(answer="7") == "{7}"


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"prompt": "Q:"}, r"prompt template: must hold \{question\} once and no other placeholder, got 'Q:'"),
        ({"step": "{step} {step}"}, r"step template: must hold \{step\} once"),
        ({"answer": "{question} {answer}"}, r"answer template: must hold \{answer\} once"),
        ({"answer": "{answer!r}"}, r"answer template: must hold \{answer\} once"),
        ({"step": "{step:>9}"}, r"step template: must hold \{step\} once"),
        ({"answer": "{answer"}, "answer template: .*expected '}' before end of string.*Write a literal brace twice"),
        ({"prompt": None}, "prompt template: .* got None. Give a text"),
    ],
)
def test_refuses_a_template_without_its_placeholder(templates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Templates(**templates)


def test_an_error_lists_ten_rows_and_counts_the_others() -> None:
    error = BadRowsError([(index, "answer: is empty") for index in range(5, 17)])
    lines = str(error).split("\n")
    assert lines[0] == "dataset: 12 bad rows."
    assert lines[1] == "  row 5: answer: is empty"
    assert lines[10] == "  row 14: answer: is empty"
    assert lines[11] == "  and 2 more"
    assert "on_bad_rows='drop'" in lines[12]
    assert error.rows[11] == (16, "answer: is empty")
    assert copy.copy(error).rows == error.rows
