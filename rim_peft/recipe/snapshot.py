"""A recipe as it was run: every option of this package spelled out, so that later defaults do not change it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields
from functools import cache
from typing import Any

from rim_peft.methods import METHODS, STAGES
from rim_peft.recipe.keys import option_names, section_class
from rim_peft.recipe.sections import Recipe

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
