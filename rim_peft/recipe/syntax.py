"""The YAML of recipes, ``key=value`` arguments, and the conversion of values to their fields' types.

YAML 1.1 reads ``1e-4`` as a text, ``no`` as false and ``010`` as eight. Here a scalar is a number, ``true``, ``false``
or ``null`` exactly as in YAML 1.2, in files and on the command line; everything else is a text. A repeated key is an
error.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.reader import ReaderError

from rim_peft.values import BoundedLoader, cut, shown

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


SHOWN_KEYS = 20
"""How many keys with the same kind of problem are listed."""

_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Loader(BoundedLoader):
    """The bounded loader with the scalars above; ``repeated`` collects keys given twice in a mapping."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - filled below

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[tuple[int, str]] = []

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct a value; refuses tags that recipes do not have, and texts that cannot be written to a file."""
        if node.tag not in _TAGS:
            raise _unreadable(node, f"the tag {shown(node.tag)} is not allowed in a recipe")
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError, OverflowError):  # e.g. `!!int x`, or an integer of 5,000 digits
            raise _unreadable(
                node, f"{shown(node.value)} is no {node.tag.rpartition(':')[2]} that can be read"
            ) from None
        if isinstance(value, str) and re.search("[\\0\ud800-\udfff]", value):
            raise _unreadable(node, f"a text must not hold NUL or half a character, as {shown(value)} does")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _unreadable(key_node, "a key must be a text")
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                self.repeated.append((key_node.start_mark.line + 1, cut(str(key), most=60)))
            keys.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes texts that :class:`_Loader` would not read as texts."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - filled below

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_yaml(text: str) -> Any:
    """Read a YAML document.

    >>> read_yaml("{learning_rate: 1e-4, eval_strategy: no, resume: true}")
    {'learning_rate': 0.0001, 'eval_strategy': 'no', 'resume': True}

    Raises:
        ValueError: it is not YAML, or a mapping has a key twice; one line per problem, with its line number.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"must not hold the character {shown(chr(error.character))}, which cannot be printed"
        raise ValueError(f"line {line}: not valid YAML: {message}.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: not valid YAML: {cut(error.problem or str(error))}.") from None
    if loader.repeated:
        lines = [f"line {line}: {key}: is given twice, keep one." for line, key in loader.repeated[:SHOWN_KEYS]]
        raise ValueError("\n".join(lines))
    return value


def write_yaml(values: Mapping[str, Any]) -> str:
    """Return a document that :func:`read_yaml` reads back unchanged.

    >>> print(write_yaml({"seed": 0, "prompt": "1e-4", "path": None}), end="")
    seed: 0
    prompt: '1e-4'
    path: null
    """
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_override(text: str) -> tuple[str, Any]:
    """Read ``section.key=value``; the value is YAML.

    >>> read_override("grounding.learning_rate=1e-4"), read_override("refinement=null")
    (('grounding.learning_rate', 0.0001), ('refinement', None))

    Raises:
        ValueError: there is no ``=``, or the value is not YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ValueError(
            f"{cut(text)}: must read key=value, for instance data.path=folder or grounding.learning_rate=1e-4."
        )
    key = key.strip()
    try:
        return key, read_yaml(value)
    except ValueError as error:
        name = cut(key, most=60)
        raise ValueError(f"{name}: {cut(str(error))} Put the value in quotes: {name}='\"...\"'.") from None


def _unreadable(node: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}


class WrongTypeError(ValueError):
    """A value does not match its field's type hint."""


def convert(value: Any, hint: Any) -> Any:
    """Convert a YAML value to a field's type; an integer is accepted for a float.

    >>> convert(1, float), convert("all-linear", list[str] | str | None)
    (1.0, 'all-linear')

    Raises:
        WrongTypeError: the value has the wrong type; names the expected type and the value.
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
    """Tell whether a type hint allows None."""
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
    return "a mapping" if _container(hint) is dict else "omitted, a recipe cannot set it"


_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def hint_schema(hint: Any) -> dict[str, Any] | None:
    """Return the JSON schema of the values that a type hint allows; None if a recipe cannot set it.

    >>> hint_schema(str | None), hint_schema(list[float] | str)
    ({'type': ['string', 'null']}, {'anyOf': [{'type': 'array', 'items': {'type': 'number'}}, {'type': 'string'}]})
    """
    if hint is Any:
        return {}
    if hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    if _is_union(hint):
        arms = [found for arm in get_args(hint) if (found := hint_schema(arm)) is not None]
        if not arms:
            return None
        is_plain = all([*arm] == ["type"] for arm in arms)
        return {"type": [arm["type"] for arm in arms]} if is_plain else {"anyOf": arms}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if _is_enum(hint):
        return {"enum": [member.value for member in hint]}
    if _container(hint) in (list, tuple):
        items = [found for item in get_args(hint)[:1] if (found := hint_schema(item)) is not None]
        return {"type": "array", **({"items": items[0]} if items else {})}
    return {"type": "object"} if _container(hint) is dict else None


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
