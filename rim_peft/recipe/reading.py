"""YAML and ``key=value`` → :class:`Recipe`, with every problem reported at once; a recipe as it was run."""

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

_FREE_ON_RESUME = ("output_dir", "resume")
"""Keys that may change between a run and its resumption: the folder may have been moved."""

_EARLIER = {"data.allow_special_tokens": True}
"""How versions that did not know an option yet ran, where that is not its default: either goes on with their runs."""


def resolve(recipe: Recipe) -> dict[str, Any]:
    """Return all that a recipe gives and the defaults of this package's own options, as YAML takes it."""
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    for name in ("model", "data", "evaluation"):
        values[name] = asdict(values[name])
    for name in ("adapter", *STAGES):
        if values[name] is not None:
            values[name] = {**_own_defaults(name), **values[name]}
    return {**values, "resume": False}


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """List the keys in which two resolved recipes differ.

    Left out are those that a resumed run may change, and what the second one's method does not read. An option that
    the first one lacks, which an earlier version has written, was at its default.

    >>> first = {"method": "cot", "seed": 0, "data": {"path": "a"}, "coconut": {"num_stages": 3}}
    >>> differing_keys(first, {"method": "cot", "seed": 0, "data": {"path": "b"}, "coconut": {}, "resume": True})
    ['data.path']
    """
    before, after = dict(_leaves(first)), dict(_leaves(second))
    missing = object()
    method = METHODS.get(str(second.get("method")))
    free = {*_FREE_ON_RESUME, *STAGES} - set(STAGES if method is None else method.stages)
    keys = [key for key in {**before, **after} if key.partition(".")[0] not in free]
    return [
        key
        for key in keys
        if before.get(key, missing) != after.get(key, missing) and (key in before or not _is_new(key, after[key]))
    ]


def _is_new(key: str, value: Any) -> bool:
    """Tell whether an earlier version, which did not know an option of this package, ran as with this value."""
    section, _, name = key.partition(".")
    if not name:
        return False
    defaults = [_own_defaults(section)[name]] if name in _own_defaults(section) else []
    return value in [*defaults, *([_EARLIER[key]] if key in _EARLIER else [])]


@cache
def own_fields(section: str) -> list[Field[Any]]:
    """List the options of a section that this package itself defines."""
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
"""Names of keys whose texts are paths, or ids of the Hub."""


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, check: bool = True, places: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe and check everything in it that needs neither its model nor its rows.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each, which win over the file.
        check: also check the fields of adapter, stages, base and task; without it (for a run that was made, perhaps on
            another machine) only the sections that this package defines.
        places: of the overrides' keys, as problems with them shall name it; the command line if not given.

    Raises:
        RecipeError: all that is wrong, one line each.
        OSError: the file cannot be read.
    """
    values = read_mapping(path, example="output_dir: outputs/run")
    problems = Problems(str(path), all_keys)
    given = _read_overrides(overrides, problems)
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
    """Read the recipe in the folder of a run, perhaps another's and made on another machine: nothing in it runs code.

    Args:
        path: the file.
        trust_remote_code: whether whoever loads the folder lets code run that comes with the base.

    Raises:
        RecipeError: all that is wrong; or the recipe asks for code of the base, which nobody lets run.
        OSError: the file cannot be read.
    """
    recipe = load_recipe(path, check=False)
    model = recipe.model
    if model.trust_remote_code and not trust_remote_code:
        base = f"the base {shown(model.name_or_path)}" if model.name_or_path is not None else "the base"
        raise RecipeError(
            f"{path}: model.trust_remote_code: asks to run code that comes with {base}, which a file cannot decide. If "
            "you trust that code, give --trust-remote-code (in Python trust_remote_code=True)."
        )
    values = {field.name: getattr(recipe, field.name) for field in fields(Recipe)}
    return FoundRecipe(**{**values, "model": replace(model, trust_remote_code=trust_remote_code)})


def read_mapping(path: str | Path, *, example: str) -> dict[str, Any]:
    """Read a YAML file that holds keys with values; ``example`` shows one where it does not.

    Raises:
        RecipeError: it is no YAML, or holds something else.
        OSError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(4 * MOST_CHARACTERS + 1)  # a character has at most four bytes
        values = read_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: must be a text in UTF-8, and is not at byte {error.start}. Save it as UTF-8."
        ) from None
    except ValueError as error:
        raise RecipeError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must hold keys with values, such as '{example}'.")
    return values


def check_leaves(values: dict[Any, Any], problems: Problems, section: str = "") -> None:
    """Note values that no option can have, take them out, and write home folders out.

    These are numbers that are infinite, none at all or of over 64 bits, and paths with control characters.
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
    """Tell whether a value is no number, or one that a computer's numbers can be."""
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < 1 << 63


def _read_path(text: str, key: str, problems: Problems) -> str:
    if any(unicodedata.category(char) == "Cc" for char in text):
        problems.add(key, f"must not hold control characters, got {shown(text)}.")
        return text
    try:
        return text if key.endswith("data.path") else expand_user(text)  # that is kept as given, and expanded when read
    except ValueError as error:
        problems.add(key, str(error))
        return text


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
    """Return a section's dataclass, None if something is wrong with it."""
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
