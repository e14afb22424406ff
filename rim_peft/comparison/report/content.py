"""The content of a report, which is written as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rim_peft.comparison.plots.style import Plot


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows.

    Attributes:
        caption: what it shows.
        columns: headings, with units.
        rows: cells, one for each column.
        num_text_columns: number of leftmost columns that hold text; numbers are aligned right.
        notes: what a reader must know, one sentence each.

    Raises:
        ValueError: the number of cells of a row differs from the number of columns.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows: must have {len(self.columns)} cells, got {list(row)!r}.")


@dataclass(frozen=True)
class Code:
    """Text shown verbatim, such as a command."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Sentences in a list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Link:
    """A sentence that leads to a file beside the report; ``target`` is its path from there."""

    text: str
    target: str


Part = str | Table | Code | Bullets | Link | Plot
"""A paragraph, or one of the other parts. Plots directly after a table show its figures."""
PlotsOf = Callable[[str], Sequence[Part]]
"""Topic → the plots that belong to it."""


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        """The section's name in links.

        >>> Section("What was compared", ()).anchor
        'what-was-compared'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """A title, what was compared in one line, and the sections, of which the first is the result."""

    title: str
    facts: str
    sections: Sequence[Section]


def beside(tables: Sequence[Table], plots: Sequence[Part]) -> list[Part]:
    """Return each table with its plot after it, and what is left of either at the end."""
    pairs = zip_longest(tables, plots)
    return [part for pair in pairs for part in pair if part is not None]
