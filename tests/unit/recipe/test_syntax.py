"""Recipe files as YAML."""

import math

import pytest

from rim_peft.recipe.syntax import read_override, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("010", 10),
        ("-7", -7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_are_read_as_yaml_1_2_says(text: str, value: object) -> None:
    read = read_yaml(text)
    assert read == value
    assert type(read) is type(value)


def test_what_is_written_is_read_back() -> None:
    values = {
        "a": "1e-4",
        "b": 1e-5,
        "c": "no",
        "d": "true",
        "e": [1, 2.5],
        "f": {"g": None, "h": "{question}\n"},
        "i": "",
    }
    assert read_yaml(write_yaml(values)) == values
    assert math.isinf(read_yaml(write_yaml({"a": math.inf}))["a"])


def test_repeated_keys_are_all_refused_with_their_lines() -> None:
    with pytest.raises(ValueError, match=r"line 2: seed: is given twice, keep one\.\nline 5: r: is given twice"):
        read_yaml("seed: 0\nseed: 1\nadapter:\n  r: 1\n  r: 2\n")


def test_broken_yaml_is_named_by_its_line() -> None:
    with pytest.raises(ValueError, match="line 2: not valid YAML"):
        read_yaml("a: [1,\nb: 2")


def test_code_in_yaml_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml("a: !!python/object/apply:os.getcwd []")


def test_overrides_hold_yaml() -> None:
    assert read_override("grounding.learning_rate=1e-4") == ("grounding.learning_rate", 1e-4)
    assert read_override("data.path=a=b") == ("data.path", "a=b")
    assert read_override('data.prompt_template="{question}\\n"') == ("data.prompt_template", "{question}\n")


@pytest.mark.parametrize("text", ["data.path", "=1"])
def test_overrides_need_key_and_value(text: str) -> None:
    with pytest.raises(ValueError, match="must read key=value"):
        read_override(text)


def test_an_override_that_is_no_yaml_is_told_to_quote() -> None:
    with pytest.raises(ValueError, match=r"output_dir: line 1: not valid YAML.*in quotes"):
        read_override("output_dir=[a")
