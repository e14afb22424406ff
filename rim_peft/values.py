"""Values that somebody wrote into a file: bounded before they are parsed, in their range, shown on one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 18
"""Longest YAML document, with every alias written out; a key or a value counts as eight characters at least."""

MOST_LEVELS = 40
"""How deep lists and mappings may be nested in a YAML document."""

_NODE_CHARACTERS = 8
_LINE = 400


class BoundedLoader(yaml.SafeLoader):
    """YAML's safe loader for documents of bounded size, depth and expansion: else ten lines can fill any memory.

    Raises:
        ValueError: the document is too long.
        yaml.MarkedYAMLError: while composing, it is too deep, too long with its aliases written out, or holds itself.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"must be at most {MOST_CHARACTERS:,} characters long, got {len(text):,}.")
        super().__init__(text)
        self._level = self._characters = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """Compose a node and count it; an alias counts as all that it stands for."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _refused("an alias must not stand for what holds it", event)
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
            raise _refused(f"keys and values must take at most {MOST_CHARACTERS:,} characters, aliases too", event)


def check_yaml(text: str) -> None:
    """Check that a YAML document can be parsed in bounded time and memory.

    Raises:
        ValueError: it is too long.
        yaml.YAMLError: it is too deep, too long with its aliases written out, or no YAML.
    """
    loader = BoundedLoader(text)
    try:
        loader.get_single_node()
    finally:
        loader.dispose()


def cut(text: str, most: int = _LINE) -> str:
    """Return a text as one line that can be read: without control characters, and without its middle if it is long.

    >>> cut("a\\n b"), cut("0123456789" * 10, most=30)
    ('a b', '01234567890123456789 ... 23456789')
    """
    if len(text) > 4 * most:  # white space and escapes may make it shorter, but not by that much
        text = f"{text[: 2 * most]} ... {text[-2 * most :]}"
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most * 2 // 3]} ... {line[2 - most // 3 :]}"


def shown(value: object) -> str:
    """Return a value as messages show it: as Python writes it, cut.

    >>> shown({"question": None})
    "{'question': None}"
    """
    return cut(repr(value), most=200)


def expand_user(path: str) -> str:
    """Return a path with a leading ``~`` as the home folder that it stands for; ids of the Hub stay as they are.

    Raises:
        ValueError: there is no such user.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"must be in a home folder that there is, got {shown(path)}. Write the path out.") from None


@dataclass(frozen=True)
class Range:
    """Numbers that an option can have, both ends included unless one is open; beyond them it cannot work.

    >>> str(Range(1, 8)), str(Range(0, 1, below=True)), str(Range(0, 9, above=True))
    ('from 1 to 8', 'at least 0 and below 1', 'above 0 and at most 9')
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        is_high_enough = value > self.least if self.above else value >= self.least
        return is_high_enough and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        if not self.above and not self.below:
            return f"from {self.least} to {self.most}"
        low = f"above {self.least}" if self.above else f"at least {self.least}"
        return f"{low} and {'below' if self.below else 'at most'} {self.most}"


def check_ranges(owner: object, ranges: Mapping[str, Range]) -> None:
    """Check the numbers of an object; None and what is no number are left to others.

    Raises:
        ValueError: one is out of its range; names it.
    """
    for name, allowed in ranges.items():
        value = getattr(owner, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value not in allowed:
            raise ValueError(f"{name}: must be {allowed}, got {shown(value)}.")


def _refused(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
