"""The JSON schema of recipes: it takes what is read and refuses what is not."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from rim_peft.comparison.reading import file_schema
from rim_peft.recipe.checks import section_class
from rim_peft.recipe.options import SECTIONS, list_options
from rim_peft.recipe.syntax import WrongTypeError, convert, hint_schema, hints_of, read_yaml
from rim_peft.tasks import TASKS, task_class

ROOT = Path(__file__).parents[3]
RECIPES = sorted(
    {*ROOT.glob("recipes/**/*.yaml"), ROOT / "rim_peft/demo/recipe.yaml"} - {*ROOT.glob("recipes/accelerate/*")}
)
VALUES = [None, True, 3, 0.5, "x", "linear", "auto", [], [1], [0.5], ["a"], [["a"]], [{}], {}, {"a": 1}]


@pytest.fixture(scope="module")
def schema() -> Draft7Validator:
    found = file_schema()
    Draft7Validator.check_schema(found)
    return Draft7Validator(found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_is_valid(schema: Draft7Validator, path: Path) -> None:
    assert [error.message for error in schema.iter_errors(read_yaml(path.read_text(encoding="utf-8")))] == []


BASE = {"output_dir": "x", "model": {"name_or_path": "gpt2"}, "data": {"task": "potions"}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"output_dri": "x"}, "'output_dri' was unexpected"),
        ({"output_dir": None}, "None is not of type 'string'"),
        ({"adapter": {"num_blcks": 4}}, "'num_blcks' was unexpected"),
        ({"adapter": {"peft_type": "RIM"}}, "'peft_type' was unexpected"),
        ({"grounding": {"learning_rate": "fast"}}, "'fast' is not of type 'number'"),
        ({"model": {"name_or_path": "x", "dtype": "float64"}}, "'float64' is not one of"),
        ({"method": "rimm"}, "'rimm' is not one of"),
        ({"data": {"task": "potions", "options": {"num_row": 3}}}, "'num_row' was unexpected"),
        ({"data": {"path": "x", "options": {"num_rows": 3}}}, "'num_rows' was unexpected"),
        ({"recipe": "r.yaml", "measures": {"budgets": []}}, "'budgets' was unexpected"),
        ({"recipe": "r.yaml", "methods": {"a": {"changes": {"adapter.r": "4"}}}}, "'4' is not of type 'integer'"),
    ],
)
def test_mistakes_are_marked(schema: Draft7Validator, changes: dict[str, Any], complaint: str) -> None:
    given = {"output_dir": "x"} if "recipe" in changes else BASE
    assert schema.is_valid(given if "recipe" not in changes else {**given, "recipe": "r.yaml"})
    messages = [error.message for error in schema.iter_errors({**given, **changes})]
    assert any(complaint in message for message in messages), messages


@pytest.mark.parametrize(
    "owner", [*map(section_class, SECTIONS[1:]), *map(task_class, TASKS)], ids=lambda owner: owner.__name__
)
def test_values_are_valid_that_can_be_read(owner: Any) -> None:
    hints = hints_of(owner)
    for field in fields(owner):
        found = hint_schema(hints[field.name])
        for value in VALUES:
            try:
                convert(value, hints[field.name])
                is_read = True
            except WrongTypeError:
                is_read = False
            is_valid = found is not None and Draft7Validator(found).is_valid(value)
            assert is_valid == is_read, (field.name, value)


def test_keys_have_their_help_and_default(schema: Draft7Validator) -> None:
    recipe = schema.schema["definitions"]["recipe"]
    for section in SECTIONS[1:]:
        for option in list_options(section):
            found = recipe["properties"][section]["properties"][option.key.partition(".")[2]]
            assert found["description"] == option.help
    assert recipe["properties"]["adapter"]["properties"]["num_blocks"]["default"] == 8
