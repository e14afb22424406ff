from __future__ import annotations

from typing import Any

import pytest

from rim_peft.data.examples import RowError
from rim_peft.tasks.task import read_texts, require_number, require_text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (51.0, "51"),
        (51, "51"),
        ("51", "51"),
        ("145.0", "145"),
        ("1,050", "1050"),
        (-9825743600.0, "-9825743600"),
        (2.0107e-06, "0.0000020107"),
        (9284017268534.4, "9284017268534.4"),
        (100, "100"),
        ("0.50", "0.5"),
        (-0.0, "0"),
        ("1e3", "1000"),
    ],
)
def test_numbers_become_plain_decimals(value: float | str, expected: str) -> None:
    text = require_number({"target": value}, "target")
    assert text == expected
    assert float(text) == float(str(value).replace(",", ""))


@pytest.mark.parametrize("value", [True, None, "many", "", float("inf"), float("nan"), "1e999", [1]])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="target or Answer: must be a number, got"):
        require_number({"Answer": value}, "target", "Answer")


def test_names_the_fields_that_are_missing() -> None:
    with pytest.raises(RowError, match="input or question: the row has no such field; its fields: text"):
        require_text({"text": "q"}, "input", "question")
    with pytest.raises(RowError, match="input: must be a text that is not empty, got ' '"):
        require_text({"input": " "}, "input")


def test_texts_are_a_list_or_sentences() -> None:
    assert read_texts({"facts": ["A.", " ", "B."]}, "facts") == ("A.", "B.")
    assert read_texts({"facts": "A is b. C is d."}, "facts") == ("A is b.", "C is d.")
    assert read_texts({"facts": None}, "facts") is read_texts({"facts": []}, "facts") is read_texts({}, "facts") is None
    with pytest.raises(RowError, match=r"facts: must be a text or a list of texts, got \[1\]"):
        read_texts({"facts": [1]}, "facts")
