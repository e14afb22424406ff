"""Values against type hints."""

from typing import Any, Literal, Optional

import pytest
from transformers.trainer_utils import IntervalStrategy

from rim_peft.recipe.syntax import WrongTypeError, allows_none, convert, describe


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (1, int, 1),
        (True, bool, True),
        ("a", str | None, "a"),
        (None, Optional[int], None),  # noqa: UP045 - what PEFT's hints look like
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 2], tuple[int, ...], [1, 2]),
        ([1], list[int] | str, [1]),
        ({"a": 1}, dict[str, Any] | str | None, {"a": 1}),
        ("epoch", IntervalStrategy | str, "epoch"),
        ("drop", Literal["error", "drop"], "drop"),
    ],
)
def test_values_that_fit(value: object, hint: Any, expected: object) -> None:
    converted = convert(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "must be an integer, got True"),
        (False, float, "must be a number, got False"),
        (1, bool, "must be true or false, got 1"),
        (1.0, int, "must be an integer, got 1.0"),
        ("1e-4", float, "must be a number, got '1e-4'"),
        (None, str, "must be a text, got None"),
        (3, str, "must be a text, got 3, put it in quotes"),
        ({"question": None}, str, "must be a text, got"),
        (["a", 1], list[str], r"must be a list \(each a text\)"),
        ("skip", Literal["error", "drop"], "must be 'error' or 'drop', got 'skip'"),
        (1, Literal["a", True], "got 1"),
        ([1], dict[str, Any], "must be a mapping"),
        ("x", pytest.Item, "omitted, a recipe cannot set it"),
    ],
)
def test_values_that_do_not_fit(value: object, hint: Any, message: str) -> None:
    with pytest.raises(WrongTypeError, match=message):
        convert(value, hint)


def test_which_hints_allow_none() -> None:
    assert allows_none(str | None)
    assert allows_none(Any)
    assert not allows_none(list[str | None])
    assert not allows_none(str)


def test_hints_in_words() -> None:
    assert describe(int | float | None) == "an integer, a number or null"
    assert describe(IntervalStrategy | str) == "a text"
