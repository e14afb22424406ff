"""YAML and ``key=value`` → :class:`Comparison`, with every problem reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rim_peft.comparison.sections import Comparison, MeasureOptions, MethodOptions, RowsOptions
from rim_peft.recipe import RecipeError
from rim_peft.recipe.conversion import hints_of
from rim_peft.recipe.problems import COMMAND_LINE, Problems, join, on_command_line
from rim_peft.recipe.reading import check_leaves, read_mapping
from rim_peft.recipe.syntax import read_override
from rim_peft.values import shown

SECTIONS: dict[str, type] = {"test": RowsOptions, "selection": RowsOptions, "measures": MeasureOptions}


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read the recipe of a comparison and check what needs neither models nor rows.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each, which win over the file.

    Raises:
        RecipeError: all that is wrong, one line each.
        OSError: the file cannot be read.
    """
    values = read_mapping(path, example="recipe: recipes/gsm8k/tiny.yaml")
    problems = Problems(str(path), _all_keys)
    for text in overrides:
        try:
            key, value = read_override(text)
        except ValueError as error:
            problems.lines.append(f"{COMMAND_LINE}: {error}")
            continue
        problems.overridden = {**problems.overridden, **on_command_line([key])}
        _set(values, key.split("."), value)
    check_leaves(values, problems)
    comparison = _read(values, problems)
    problems.raise_any()
    if comparison is None:
        raise RecipeError(f"{path}: cannot be read.")
    return comparison


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a key in nested values; inside ``changes``, ``search`` and ``grid`` the rest of the path is one key."""
    for depth, name in enumerate(path[:-1]):
        if name in ("changes", "search") or (name == "grid" and depth == 0):
            values[name] = {**(values.get(name) or {}), ".".join(path[depth + 1 :]): value}
            return
        inside = values.get(name)
        values[name] = dict(inside) if isinstance(inside, dict) else {}
        values = values[name]
    values[path[-1]] = value


def _read(values: dict[str, Any], problems: Problems) -> Comparison | None:
    problems.check_keys("", values, [field.name for field in Comparison.options()])
    read: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        default = {"split": "validation"} if name == "selection" else {"split": "test"} if name == "test" else {}
        read[name] = _read_section(name, section, {**default, **_mapping(name, values.get(name), problems)}, problems)
    read["methods"] = {}
    for name, entry in _mapping("methods", values.get("methods"), problems).items():
        key = f"methods.{name}"
        read["methods"][str(name)] = _read_section(key, MethodOptions, _mapping(key, entry, problems), problems)
    hints = {name: hint for name, hint in hints_of(Comparison).items() if name not in (*read, "where")}
    top = problems.convert("", hints, {name: value for name, value in values.items() if name in hints})
    for name in ("output_dir", "recipe"):
        if not top.get(name):
            problems.add(name, "must be given.")
    if top.get("recipe") and not Path(top["recipe"]).is_file():
        problems.add("recipe", f"must be a file, got {shown(top['recipe'])}, which is none in {Path.cwd()}.")
    if problems.lines:
        return None
    return problems.build("", Comparison, {**top, **read, "where": problems.where})


def _mapping(name: str, value: Any, problems: Problems) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return dict(value or {})
    problems.add(name, f"must be a section with keys, got {shown(value)}.")
    return {}


def _read_section(name: str, section: type, values: dict[str, Any], problems: Problems) -> Any:
    problems.check_keys(name, values, [field.name for field in fields(section)])
    converted = problems.convert(name, hints_of(section), values)
    for field in fields(section):
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if is_needed and converted.get(field.name) is None:
            problems.add(join(name, field.name), "must be given.")
            return None
    return problems.build(name, section, converted)


def _all_keys() -> list[str]:
    inside = [join(name, field.name) for name, section in SECTIONS.items() for field in fields(section)]
    return [*(field.name for field in Comparison.options()), *inside]
