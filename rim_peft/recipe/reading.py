"""YAML and ``key=value`` → :class:`Recipe`, with every problem reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from rim_peft.recipe.checks import check_classes
from rim_peft.recipe.keys import OWN_SECTIONS, all_keys, option_names
from rim_peft.recipe.problems import COMMAND_LINE, Problems, RecipeError, join
from rim_peft.recipe.sections import Recipe
from rim_peft.recipe.syntax import read_override, read_yaml


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Recipe:
    """Read a recipe and check everything in it that needs neither its model nor its rows.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each, which win over the file.
        check: also check the fields of adapter, stages, base and task; without it (for a run that was made, perhaps on
            another machine) only the sections that this package defines.

    Raises:
        RecipeError: all that is wrong, one line each.
        OSError: the file cannot be read.
    """
    values = read_mapping(path, example="output_dir: outputs/run")
    problems = Problems(str(path), all_keys)
    given = _read_overrides(overrides, problems)
    problems.overridden = frozenset(given)
    for key, value in given.items():
        _override(values, key, value, problems)
    if check:
        values = {**values, **check_classes(values, problems)}
    recipe = _read_recipe(values, problems)
    problems.raise_any()
    if recipe is None:
        raise RecipeError(f"{path}: cannot be read.")
    return recipe


def read_mapping(path: str | Path, *, example: str) -> dict[str, Any]:
    """Read a YAML file that holds keys with values; ``example`` shows one where it does not.

    Raises:
        RecipeError: it is no YAML, or holds something else.
        OSError: the file cannot be read.
    """
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must hold keys with values, such as '{example}'.")
    return values


def _read_overrides(overrides: Sequence[str], problems: Problems) -> dict[str, Any]:
    given = {}
    for text in overrides:
        try:
            key, value = read_override(text)
        except ValueError as error:
            problems.lines.append(f"{COMMAND_LINE}: {error}")
        else:
            given[key] = value
    return given


def _override(values: dict[str, Any], key: str, value: Any, problems: Problems) -> None:
    """Set a key of the nested values. A base given in one way displaces the file's base given in the other."""
    *sections, name = key.split(".")
    inside = values
    for section in sections:
        if inside.get(section) is None:
            inside[section] = {}
        inside = inside[section]
        if not isinstance(inside, dict):
            problems.add(key, f"{section} is a value, not a section.")
            return
    inside[name] = value
    displaced = {"model.name_or_path": "config", "model.config": "name_or_path"}.get(key)
    if displaced is not None and value is not None and join("model", displaced) not in problems.overridden:
        inside.pop(displaced, None)


def _read_recipe(values: dict[str, Any], problems: Problems) -> Recipe | None:
    """Build the recipe from the sections that this package defines; the others are taken as they are."""
    own: dict[str, Any] = dict.fromkeys(OWN_SECTIONS)
    is_whole = True
    for name, section in OWN_SECTIONS.items():
        inside = values.get(name)
        if inside is not None and not isinstance(inside, dict):
            problems.add(name, f"must be a section with keys, got {inside!r}.")
            is_whole = False
            continue
        own[name] = _read_section(name, section, inside or {}, problems)
        is_whole = is_whole and own[name] is not None
    problems.check_keys("", values, [field.name for field in fields(Recipe)])
    hints = {name: hint for name, hint in get_type_hints(Recipe).items() if name not in own}
    top = problems.convert("", hints, {name: value for name, value in values.items() if name in hints})
    if not top.get("output_dir"):
        problems.add("output_dir", "must be given: the folder to write to.")
        return None
    return problems.build("", Recipe, {**top, **own}) if is_whole else None


def _read_section(name: str, section: type, values: dict[str, Any], problems: Problems) -> Any:
    """Return a section's dataclass, None if something is wrong with it."""
    found = len(problems.lines)
    problems.check_keys(name, values, option_names(name))
    converted = problems.convert(name, get_type_hints(section), values)
    missing = [field.name for field in fields(section) if field.default is MISSING and field.default_factory is MISSING]
    for field_name in missing:
        if values.get(field_name) is None:
            problems.add(join(name, field_name), "must be given.")
    if any(field_name not in converted for field_name in missing):
        return None
    made = problems.build(name, section, converted)
    return made if len(problems.lines) == found else None
