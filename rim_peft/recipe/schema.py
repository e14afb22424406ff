"""The JSON schema of recipes: with it an editor completes keys, shows their help and marks values of the wrong type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, Literal

from rim_peft.recipe.checks import SET_ELSEWHERE, section_class
from rim_peft.recipe.options import SECTIONS, help_of
from rim_peft.recipe.sections import DataOptions, Recipe
from rim_peft.recipe.syntax import hint_schema, hints_of
from rim_peft.tasks import TASKS, task_class


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe, with the options of every task, and those that other libraries give the stages."""
    sections = {name: _section(name) for name in SECTIONS[1:]}
    sections["data"]["allOf"] = list(_task_options())
    return {**fields_schema(Recipe, fields(Recipe), sections), "required": ["output_dir", "model"]}


def key_references(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return references to the schemas of all keys of a recipe by their full names (``adapter.num_blocks``).

    Args:
        recipe: the recipe's schema, at ``#/definitions/recipe`` of the document.
    """
    places = {name: f"#/definitions/recipe/properties/{name}" for name in recipe["properties"]}
    for name in SECTIONS[1:]:
        inside = f"{places[name]}/properties"
        places |= {f"{name}.{key}": f"{inside}/{key}" for key in recipe["properties"][name]["properties"]}
    return {key: {"$ref": place} for key, place in places.items()}


def fields_schema(
    owner: type, inside: Iterable[Field[Any]], sections: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the schema of a section whose keys are fields of a dataclass; null stands for a default.

    Args:
        owner: the dataclass.
        inside: its fields that a recipe can set.
        sections: schemas of fields that have keys of their own.
    """
    hints, properties = hints_of(owner), {}
    for field in inside:
        choices = field.metadata.get("choices")
        found = hint_schema(Literal[tuple(choices)] if choices else hints[field.name])
        found = (sections or {}).get(field.name, found)
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if found is not None:
            is_optional = has_default or field.name in (sections or {})
            properties[field.name] = {**(_or_null(found) if is_optional else found), **_notes(field)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {**schema, "type": list(dict.fromkeys([*types, "null"]))}
    more: dict[str, list[Any]] = {"enum": [None], "anyOf": [{"type": "null"}]}
    return {**schema, **{key: schema[key] + null for key, null in more.items() if key in schema}}


def _section(name: str) -> dict[str, Any]:
    owner = section_class(name)
    return fields_schema(owner, [field for field in fields(owner) if field.name not in SET_ELSEWHERE.get(name, ())])


def _task_options() -> Iterator[dict[str, Any]]:
    """Yield a condition for each task: the keys of ``data.options`` if ``data.task`` names it."""
    for name in TASKS:
        task: Any = task_class(name)
        is_named = {"properties": {"task": {"const": name}}, **({} if name == DataOptions.task else _TASK_GIVEN)}
        yield {"if": is_named, "then": {"properties": {"options": fields_schema(task, fields(task))}}}


_TASK_GIVEN = {"required": ["task"]}


def _notes(field: Field[Any]) -> dict[str, Any]:
    """Return a key's help and its default, where it has one that JSON can hold."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    default = default.value if isinstance(default, Enum) else default
    is_plain = default is None or isinstance(default, bool | int | float | str | list | dict)
    text = help_of(field)
    return {**({"description": text} if text else {}), **({"default": default} if is_plain else {})}
