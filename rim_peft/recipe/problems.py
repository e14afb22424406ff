"""All that is wrong with a recipe, collected before any of it is reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from rim_peft.recipe.conversion import WrongTypeError, allows_none, convert
from rim_peft.recipe.foreign import foreign_key
from rim_peft.recipe.syntax import SHOWN_KEYS
from rim_peft.values import cut, shown

COMMAND_LINE = "command line"

_LONGEST_KEY = 100
"""Characters of a key that is shown as it is, and that a suggestion is looked for."""


def on_command_line(keys: Iterable[str]) -> dict[str, str]:
    """Return the place of each key that was given on the command line."""
    return {key: f"{COMMAND_LINE}: {cut(key, most=_LONGEST_KEY)}" for key in keys}


class RecipeError(ValueError):
    """A recipe cannot be run; one line for each problem, ``file: key: what is wrong``."""


@dataclass
class Problems:
    """Problems by key, in the order in which they were found.

    Attributes:
        source: the recipe's file.
        all_keys: the full names of all sections' keys, to suggest one from.
        overridden: keys that were given elsewhere than in the file, each with its place (``command line: seed``).
    """

    source: str
    all_keys: Callable[[], Iterable[str]]
    overridden: Mapping[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, key: str, message: str) -> None:
        """Note what is wrong with a key."""
        self.lines.append(f"{self.where(key)}: {cut(message)}")

    def where(self, key: str) -> str:
        """Return where a key was given: file and key, or another place."""
        given = max((one for one in self.overridden if f"{key}.".startswith(f"{one}.")), key=len, default=None)
        if given is None:
            return f"{self.source}: {cut(key, most=_LONGEST_KEY)}"
        return f"{self.overridden[given]}{cut(key.removeprefix(given), most=_LONGEST_KEY)}"

    def raise_any(self) -> None:
        """Raise what was found.

        Raises:
            RecipeError: something was.
        """
        if self.lines:
            raise RecipeError("\n".join(dict.fromkeys(self.lines)))

    def check_keys(self, section: str, given: Iterable[Any], known: Iterable[str]) -> None:
        """Note the keys that a section does not have, with the nearest one that it has, or that another one has."""
        names = list(known)
        unknown = [name for name in given if name not in names]
        for name in unknown[:SHOWN_KEYS]:
            meant = self._meant(section, str(name), names)
            self.add(join(section, name), f"unknown key, did you mean {meant}?" if meant else "unknown key.")
        if len(unknown) > SHOWN_KEYS:
            name = join(section, unknown[SHOWN_KEYS])
            self.add(name, f"unknown key, and so are {len(unknown) - SHOWN_KEYS - 1} more.")

    def _meant(self, section: str, name: str, names: list[str]) -> str | None:
        """Return the key that an unknown one most likely stands for: by another tool's name, else by its letters."""
        if (foreign := foreign_key(section, name)) is not None and (section or "." in foreign or foreign in names):
            return foreign
        if len(name) > _LONGEST_KEY:
            return None
        if close := [known for known in names if known == name.lower()] or get_close_matches(name, names, n=1):
            return close[0]
        elsewhere = {key.rpartition(".")[2]: key for key in reversed(list(self.all_keys()))}
        return next((elsewhere[match] for match in get_close_matches(name, elsewhere, n=1)), None)

    def convert(self, section: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that have their field's type, and note the others.

        A null where the field cannot be None stands for the field's default.
        """
        converted = {}
        for name, value in values.items():
            if name not in hints or (value is None and not allows_none(hints[name])):
                continue
            try:
                converted[name] = convert(value, hints[name])
            except WrongTypeError as error:
                self.add(join(section, name), str(error))
        return converted

    def build(self, section: str, make: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Return ``make(**values)``, or None after noting all that it complains about.

        A constructor stops at the first bad value, so it is called again without that value until it is content.
        """
        values, complaints = dict(values), 0
        while True:
            try:
                made = make(**values)
                return None if complaints else made
            except Exception as error:
                complaints += 1
                culprit = find_culprit(make, values, str(error))
                message = _explain(error, values.get(culprit or "")).removeprefix(f"{culprit}: ")
                self.add(section if culprit is None else join(section, culprit), message)
                if culprit not in values or len(values) == 1:
                    return None
                del values[culprit]


def join(section: str, name: object) -> str:
    """Return a key's full name."""
    return f"{section}.{name}" if section else str(name)


def _explain(error: Exception, value: object) -> str:
    """Return an error's message, or another one for what Python says of a value of the wrong type."""
    if expected := re.search(r"expected (\w+), got", str(error)):
        return f"must be of type {expected[1]}, got {shown(value)}."
    if isinstance(error, ValueError | OSError | ImportError) or type(error).__module__ != "builtins":
        return str(error)
    return f"cannot be used, got {shown(value)} ({type(error).__name__})."


def find_culprit(make: Callable[..., Any], values: Mapping[str, Any], message: str) -> str | None:
    """Return the field that an error is about: the one it begins with, else the one without which it is not raised."""
    named = re.match(r"([\w.+=,-]+): ", message)
    if named is not None:
        return named[1]
    for name in values:
        try:
            make(**{other: value for other, value in values.items() if other != name})
        except Exception as error:
            if str(error) == message:
                continue
        return name
    return None
