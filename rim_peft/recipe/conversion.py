"""Values of a recipe against the type hints of the dataclass fields they are for."""

from __future__ import annotations

import types
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rim_peft.values import shown

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}


class WrongTypeError(ValueError):
    """A value is not what the field's type hint asks for."""


def convert(value: Any, hint: Any) -> Any:
    """Return a YAML value as a field with this type hint takes it: an integer also where a number is asked for.

    >>> convert(1, float), convert("all-linear", list[str] | str | None)
    (1.0, 'all-linear')

    Raises:
        WrongTypeError: the value has another type; says which is needed and which was got.
    """
    try:
        return _convert(value, hint)
    except WrongTypeError:
        quoting = ", put it in quotes" if _allows_text(hint) and isinstance(value, bool | int | float) else ""
        raise WrongTypeError(f"must be {describe(hint)}, got {shown(value)}{quoting}.") from None


@cache
def hints_of(owner: type) -> Mapping[str, Any]:
    """Return the type hints of a dataclass's fields."""
    return get_type_hints(owner)


def allows_none(hint: Any) -> bool:
    """Tell whether None is one of a field's values."""
    return hint is Any or hint is type(None) or (_is_union(hint) and any(allows_none(arm) for arm in get_args(hint)))


def describe(hint: Any) -> str:
    """Name the values that a type hint allows.

    >>> describe(list[str] | str | None), describe(Literal["error", "drop"])
    ('a list (each a text), a text or null', "'error' or 'drop'")
    """
    if hint in _WORDS:
        return _WORDS[hint]
    if _is_union(hint):
        return _join([describe(arm) for arm in get_args(hint) if not _is_enum(arm)])
    if get_origin(hint) is Literal:
        return _join([repr(choice) for choice in get_args(hint)])
    if _is_enum(hint):
        return _join([repr(member.value) for member in hint])
    if _container(hint) in (list, tuple):
        items = get_args(hint)
        return f"a list (each {describe(items[0])})" if items else "a list"
    return "a mapping" if _container(hint) is dict else "left out, a recipe cannot give it"


def _convert(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if _is_union(hint):
        return _convert_any(value, get_args(hint))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in _WORDS:
        matches = type(value) is hint
    elif get_origin(hint) is Literal:
        matches = any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    elif _is_enum(hint):
        matches = any(value == member.value for member in hint)
    elif _container(hint) in (list, tuple):
        return _convert_list(value, get_args(hint))
    else:
        matches = _container(hint) is dict and isinstance(value, Mapping)
    if not matches:
        raise WrongTypeError
    return value


def _convert_any(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except WrongTypeError:
            continue
    raise WrongTypeError


def _convert_list(value: Any, hints: tuple[Any, ...]) -> list[Any]:
    if not isinstance(value, list):
        raise WrongTypeError
    return [_convert(item, hints[0]) for item in value] if hints else value


def _container(hint: Any) -> Any:
    return get_origin(hint) or hint


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _allows_text(hint: Any) -> bool:
    return hint is str or (_is_union(hint) and str in get_args(hint))


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
