"""A plot as the report knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """A plot that was written.

    Attributes:
        name: file name without ending.
        title: what it shows, in a few words.
        caption: the same in one sentence, which is its text for those who do not see it.
        topic: key of the report's section that it belongs to.
        folder: where its files lie.
    """

    name: str
    title: str
    caption: str
    topic: str
    folder: Path

    @property
    def png(self) -> Path:
        """The picture in dots."""
        return self.folder / f"{self.name}.png"

    @property
    def svg(self) -> Path:
        """The picture in lines."""
        return self.folder / f"{self.name}.svg"


@dataclass(frozen=True)
class Drawing:
    """A plot that is not written yet; the attributes are those of :class:`Plot`."""

    name: str
    title: str
    caption: str
    topic: str
    figure: Figure
