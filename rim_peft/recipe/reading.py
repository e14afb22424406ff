"""Read a :class:`Recipe` from YAML and ``key=value``, reporting all problems at once; compare recipes of two runs."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from rim_peft.methods import METHODS, STAGES
from rim_peft.recipe.checks import OWN_SECTIONS, all_keys, check_classes, option_names, section_class
from rim_peft.recipe.problems import COMMAND_LINE, Problems, RecipeError, join, on_command_line
from rim_peft.recipe.sections import FoundRecipe, Recipe
from rim_peft.recipe.syntax import hints_of, read_override, read_yaml
from rim_peft.values import MOST_CHARACTERS, expand_user, shown

SHOWN_ONLY = ("evaluation.sample_rows",)
"""Keys of what a run shows, which change nothing of what it trains or measures."""

_FREE_ON_RESUME = ("output_dir", "resume", *SHOWN_ONLY)
"""Keys that may differ when a run is resumed, since its folder may have been moved."""

_EARLIER: dict[str, Any] = {"data.allow_special_tokens": True, "data.chat_template_kwargs": {}}
"""Values that match the behaviour of versions without the option, if not its default; runs resume with either."""


def resolve(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values and the defaults of this package's own options, as data for YAML."""
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    for name in ("model", "data", "evaluation"):
        values[name] = asdict(values[name])
    for name in ("adapter", *STAGES):
        if values[name] is not None:
            values[name] = {**_own_defaults(name), **values[name]}
    return {**values, "resume": False}


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """List the keys in which two resolved recipes differ.

    Ignores keys that a resumed run may change, and sections that the second recipe's method does not read. The first
    recipe may be from an earlier version: an option that it lacks counts as having its default.

    >>> first = {"method": "cot", "seed": 0, "data": {"path": "a"}, "coconut": {"num_stages": 3}}
    >>> differing_keys(first, {"method": "cot", "seed": 0, "data": {"path": "b"}, "coconut": {}, "resume": True})
    ['data.path']
    """
    before, after = dict(_leaves(first)), dict(_leaves(second))
    missing = object()
    method = METHODS.get(str(second.get("method")))
    free = {*_FREE_ON_RESUME, *STAGES} - set(STAGES if method is None else method.stages)
    keys = [key for key in {**before, **after} if free.isdisjoint((key, key.partition(".")[0]))]
    return [
        key
        for key in keys
        if before.get(key, missing) != after.get(key, missing) and (key in before or not _is_new(key, after[key]))
    ]


def _is_new(key: str, value: Any) -> bool:
    """Tell whether an earlier version, without this option, behaved as with this value."""
    section, _, name = key.partition(".")
    if not name:
        return False
    defaults = [_own_defaults(section)[name]] if name in _own_defaults(section) else []
    return value in [*defaults, *([_EARLIER[key]] if key in _EARLIER else [])]


@cache
def own_fields(section: str) -> list[Field[Any]]:
    """List a section's options that this package defines, not its parent classes in other packages."""
    own = set()
    for parent in section_class(section).__mro__:
        if parent.__module__.partition(".")[0] == __name__.partition(".")[0]:
            own |= set(vars(parent).get("__annotations__", ()))
    own &= set(option_names(section))
    return [field for field in fields(section_class(section)) if field.name in own]


def _own_defaults(section: str) -> dict[str, Any]:
    return {field.name: field.default for field in own_fields(section) if field.default is not MISSING}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


PATHS = ("output_dir", "name_or_path", "tokenizer", "recipe", "path", "deepspeed", "fsdp_config", "accelerator_config")
"""Names of keys whose values are paths or Hub ids."""


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, check: bool = True, places: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe, with all checks that need neither model nor rows.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each; they override the file.
        check: also check the fields of adapter, stages, base and task. Without it, as for the recipe of an existing run
            (perhaps from another machine), only this package's own sections are checked.
        places: the places to name in problems with overridden keys; the command line if not given.

    Raises:
        RecipeError: lists all problems, one line each.
        OSError: the file cannot be read.
    """
    values = read_mapping(path, example="output_dir: outputs/run")
    problems = Problems(str(path), all_keys)
    given = dict(read_overrides(overrides, problems))
    problems.overridden = {**on_command_line(given), **{str(key): place for key, place in (places or {}).items()}}
    for key, value in given.items():
        _override(values, key, value, problems)
    if check:
        check_leaves(values, problems)
        values = {**values, **check_classes(values, problems)}
    recipe = _read_recipe(values, problems)
    problems.raise_any()
    if recipe is None:
        raise RecipeError(f"{path}: cannot be read.")
    return recipe


def load_found_recipe(path: str | Path, *, trust_remote_code: bool = False) -> FoundRecipe:
    """Read the recipe in a run's folder, which may come from somebody else: it cannot make code run.

    Args:
        trust_remote_code: whether the caller allows code that comes with the base to run.

    Raises:
        RecipeError: lists all problems; or the recipe asks to run the base's code and the caller does not allow it.
        OSError: the file cannot be read.
    """
    recipe = load_recipe(path, check=False)
    model = recipe.model
    if model.trust_remote_code and not trust_remote_code:
        base = f"the base {shown(model.name_or_path)}" if model.name_or_path is not None else "the base"
        raise RecipeError(
            f"{path}: model.trust_remote_code: asks to run code that comes with {base}, which a file cannot permit. If "
            "you trust that code, give --trust-remote-code (in Python trust_remote_code=True)."
        )
    values = {field.name: getattr(recipe, field.name) for field in fields(Recipe)}
    return FoundRecipe(**{**values, "model": replace(model, trust_remote_code=trust_remote_code)})


def read_mapping(path: str | Path, *, example: str) -> dict[str, Any]:
    """Read a YAML file that holds keys with values.

    Args:
        example: an example for the error message.

    Raises:
        RecipeError: it is not YAML, or holds something else.
        OSError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(4 * MOST_CHARACTERS + 1)  # a character has at most four bytes
        values = read_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: must be valid UTF-8, but is not at byte {error.start}. Save it as UTF-8.") from None
    except ValueError as error:
        raise RecipeError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must hold keys with values, such as '{example}'.")
    return values


def check_leaves(values: dict[Any, Any], problems: Problems, section: str = "") -> None:
    """Add problems for values that no option can have, remove such numbers, and expand home folders in paths.

    Such values are numbers that are infinite, NaN or over 64 bits, and paths with control characters.
    """
    for name, value in list(values.items()):
        key = join(section, name)
        if isinstance(value, dict):
            check_leaves(value, problems, key)
        elif isinstance(value, str) and name in PATHS:
            values[name] = _read_path(value, key, problems)
        elif any(not _is_plain(number) for number in (value if isinstance(value, list) else [value])):
            problems.add(key, f"must be finite and of at most 64 bits, got {shown(value)}.")
            del values[name]


def _is_plain(value: object) -> bool:
    """Tell whether a value is not a number, or is finite and fits into 64 bits."""
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < 1 << 63


def _read_path(text: str, key: str, problems: Problems) -> str:
    if any(unicodedata.category(char) == "Cc" for char in text):
        problems.add(key, f"must not hold control characters, got {shown(text)}.")
        return text
    try:
        return text if key.endswith("data.path") else expand_user(text)  # data.path is expanded when it is read
    except ValueError as error:
        problems.add(key, str(error))
        return text


def read_overrides(overrides: Sequence[str], problems: Problems) -> list[tuple[str, Any]]:
    """Read ``key=value`` texts, and add problems for those that are none."""
    given = []
    for text in overrides:
        try:
            given.append(read_override(text))
        except ValueError as error:
            problems.lines.append(f"{COMMAND_LINE}: {error}")
    return given


def _override(values: dict[str, Any], key: str, value: Any, problems: Problems) -> None:
    """Set a nested key. An override of model.name_or_path also removes the file's model.config, or vice versa."""
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
    """Build the recipe; sections that this package does not define are kept as they are."""
    own: dict[str, Any] = dict.fromkeys(OWN_SECTIONS)
    is_whole = True
    for name, section in OWN_SECTIONS.items():
        inside = values.get(name)
        if inside is not None and not isinstance(inside, dict):
            problems.add(name, f"must be a section with keys, got {shown(inside)}.")
            is_whole = False
            continue
        own[name] = _read_section(name, section, inside or {}, problems)
        is_whole = is_whole and own[name] is not None
    problems.check_keys("", values, [field.name for field in fields(Recipe)])
    hints = {name: hint for name, hint in hints_of(Recipe).items() if name not in own}
    top = problems.convert("", hints, {name: value for name, value in values.items() if name in hints})
    if not top.get("output_dir"):
        problems.add("output_dir", "must be given: the folder to write to.")
        return None
    return problems.build("", Recipe, {**top, **own}) if is_whole else None


def _read_section(name: str, section: type, values: dict[str, Any], problems: Problems) -> Any:
    """Return a section as its dataclass; None if it has problems."""
    found = len(problems.lines)
    problems.check_keys(name, values, option_names(name))
    converted = problems.convert(name, hints_of(section), values)
    missing = [field.name for field in fields(section) if field.default is MISSING and field.default_factory is MISSING]
    for field_name in missing:
        if values.get(field_name) is None:
            problems.add(join(name, field_name), "must be given.")
    if any(field_name not in converted for field_name in missing):
        return None
    made = problems.build(name, section, converted)
    return made if len(problems.lines) == found else None
