"""Values read from files: bound them before parsing, check their ranges, show them on one line."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 18
"""Longest YAML document, with aliases expanded; each key and value counts as at least eight characters."""

MOST_LEVELS = 40
"""Deepest nesting of lists and mappings in a YAML document."""

_MOST_REPETITIONS = 6
_NODE_CHARACTERS = 8
_LINE = 400

_regex_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class BoundedLoader(yaml.SafeLoader):
    """YAML's safe loader with bounds on size, depth and alias expansion.

    Without them, ten lines can fill any memory.

    Raises:
        ValueError: the document is too long.
        yaml.MarkedYAMLError: while composing, the document is too deep, too long with aliases expanded, or contains
            itself.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"must be at most {MOST_CHARACTERS:,} characters long, got {len(text):,}.")
        super().__init__(text)
        self._level = self._characters = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """Compose a node and count its size; an alias counts as what it refers to."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _refused("an alias must not refer to a node that contains it", event)
            self._count(self._sizes[id(node)], event)
            return node
        if self._level >= MOST_LEVELS:
            raise _refused(f"must be nested at most {MOST_LEVELS} levels deep", event)
        before = self._characters
        self._count(_NODE_CHARACTERS + len(getattr(event, "value", "")), event)
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        self._sizes[id(node)] = self._characters - before
        return node

    def _count(self, characters: int, event: Any) -> None:
        self._characters += characters
        if self._characters > MOST_CHARACTERS:
            raise _refused(f"keys and values must take at most {MOST_CHARACTERS:,} characters with aliases", event)


def check_yaml(text: str) -> None:
    """Check that a YAML document can be parsed in bounded time and memory.

    Raises:
        ValueError: it is too long.
        yaml.YAMLError: it is too deep, too long with aliases expanded, or not YAML.
    """
    loader = BoundedLoader(text)
    try:
        loader.get_single_node()
    finally:
        loader.dispose()


def cut(text: str, most: int = _LINE) -> str:
    """Return a text as one printable line; long text loses its middle.

    >>> cut("a\\n b"), cut("0123456789" * 10, most=30), cut("Tom boils Kim's brew. What colour?", most=30)
    ('a b', '01234567890123456789 ... 23456789', "Tom boils Kim's ... colour?")
    """
    if len(text) > 4 * most:  # collapsed white space makes it shorter, but not by that much
        text = f"{text[: 2 * most]} ... {text[-2 * most :]}"
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
    if len(line) <= most:
        return line
    # Without the halves of words, where the line has words.
    head = re.sub(r"(?<=\S) \S{0,12}$", "", line[: most * 2 // 3])
    tail = re.sub(r"^\S{0,12} (?=\S)", "", line[2 - most // 3 :])
    return f"{head} ... {tail}"


def shown(value: object) -> str:
    """Return a value's ``repr``, cut to fit into a message.

    >>> shown({"question": None})
    "{'question': None}"
    """
    return cut(repr(value), most=200)


def some_of(names: Sequence[str], most: int) -> str:
    """Return the first of some names as text, and how many more there are.

    >>> some_of(["a", "b", "c"], 2), some_of(["a"], 2), some_of([], 2)
    ('a, b and 1 more', 'a', '')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def expand_user(path: str) -> str:
    """Expand a leading ``~`` to the home folder; Hub ids stay unchanged.

    Raises:
        ValueError: the user does not exist.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"must be in an existing home folder, got {shown(path)}. Write the path in full.") from None


@dataclass(frozen=True)
class Range:
    """Allowed numbers of an option; both ends are included unless ``above`` or ``below`` opens one.

    >>> str(Range(1, 8)), str(Range(0, 1, below=True)), str(Range(0, 9, above=True))
    ('from 1 to 8', 'at least 0 and below 1', 'above 0 and at most 9')
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        is_high_enough = value > self.least if self.above else value >= self.least
        return is_high_enough and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        if not self.above and not self.below:
            return f"from {self.least} to {self.most}"
        low = f"above {self.least}" if self.above else f"at least {self.least}"
        return f"{low} and {'below' if self.below else 'at most'} {self.most}"


def check_ranges(owner: object, ranges: Mapping[str, Range]) -> None:
    """Check the numeric attributes of an object; None and other types are skipped.

    Raises:
        ValueError: a number is out of its range.
    """
    for name, allowed in ranges.items():
        value = getattr(owner, name, None)
        if is_number(value) and value not in allowed:
            raise ValueError(f"{name}: must be {allowed}, got {shown(value)}.")


def is_number(value: object) -> bool:
    """Tell whether a value is an int or a float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_integer(name: str, value: object, *, least: int) -> None:
    """Refuse a value that is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: must be an integer of at least {least}, got {shown(value)}.")


def check_share(name: str, value: Any) -> None:
    """Refuse a value that is not a number in [0, 1)."""
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: must be a number in [0, 1), got {shown(value)}.")


def check_regex(name: str, value: object) -> None:
    """Check that a string is a valid regular expression that cannot backtrack for long.

    Raises:
        ValueError: it is invalid, or could match in very many ways: a repeated group that contains repetitions or
            alternatives, or many repetitions in a row.
    """
    if not isinstance(value, str):
        return
    try:
        parsed = _regex_parser.parse(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}: must be a regular expression or a list of names, got {shown(value)} ({error})."
        ) from None
    if _repeats_choices(parsed) or len(re.findall(r"[*+]|\{\d*,\}", value)) > _MOST_REPETITIONS:
        raise ValueError(
            f"{name}: must be a regular expression without repeated groups that contain repetitions or alternatives, "
            f"and with at most {_MOST_REPETITIONS} repetitions, got {shown(value)}: matching could take forever. List "
            "the names."
        )


def _repeats_choices(parsed: Any, *, is_repeated: bool = False) -> bool:
    """Tell whether a parsed expression can match one text in many ways; a lookahead is matched only once."""
    for operation, argument in parsed:
        kind = str(operation)
        repeats = kind in ("MAX_REPEAT", "MIN_REPEAT")
        if is_repeated and (repeats or kind == "BRANCH"):
            return True
        inside = is_repeated or (repeats and argument[1] > 1)
        if kind.startswith("ASSERT"):
            inside = False
        parts = [part for part in _flat(argument) if isinstance(part, _regex_parser.SubPattern)]
        if any(_repeats_choices(part, is_repeated=inside) for part in parts):
            return True
    return False


def _flat(argument: Any) -> Iterator[Any]:
    if isinstance(argument, list | tuple):
        for part in argument:
            yield from _flat(part)
    else:
        yield argument


def _refused(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def are_shares(value: object) -> bool:
    """Tell whether a value is a list of shares that sum to 1, none negative and the last one not 0."""
    return (
        isinstance(value, list | tuple)
        and all(map(is_number, value))
        and len(value) > 0
        and min(value) >= 0.0
        and value[-1] > 0.0
        and math.isclose(sum(value), 1.0, abs_tol=1e-6)
    )


def are_depths(value: object, count: int) -> bool:
    """Tell whether a value is a list of ``count`` shares above 0, none below the one before and the last one 1."""
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(map(is_number, value))
        and value[0] > 0.0
        and all(lower <= upper for lower, upper in pairwise(value))
        and value[-1] == 1.0
    )
