"""What a report is made of; Markdown and HTML are two ways to write the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rim_peft.comparison.plots.style import Plot


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows.

    Attributes:
        caption: what it shows.
        columns: headings, with units.
        rows: cells, as many in each as there are columns.
        num_text_columns: columns from the left that hold words; numbers stand right.
        notes: what a reader must know, one sentence each.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
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
    """Text that is shown as it is, such as a command."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Sentences in a list."""

    items: Sequence[str]


Part = str | Table | Code | Bullets | Plot
"""A paragraph, or one of the others."""
PlotsOf = Callable[[str], Sequence[Part]]
"""Topic → the plots that belong to it."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        """Name for links to it.

        >>> Section("What was compared", ()).anchor
        'what-was-compared'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """A title and its sections."""

    title: str
    sections: Sequence[Section]
