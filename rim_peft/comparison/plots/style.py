"""The style of plots: colours and markers safe for colour-blind readers, and reproducible files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_peft.comparison.results import Results
from rim_peft.escaping import one_line
from rim_peft.evaluation.scores import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """A plot on disk.

    Attributes:
        name: file name without its ending.
        title: what it shows, in a few words.
        caption: the same in one sentence, also the image's alternative text.
        topic: key of the report's section that it belongs to.
        folder: folder of its files.
    """

    name: str
    title: str
    caption: str
    topic: str
    folder: Path

    @property
    def png(self) -> Path:
        """The PNG file."""
        return self.folder / f"{self.name}.png"

    @property
    def svg(self) -> Path:
        """The SVG file."""
        return self.folder / f"{self.name}.svg"


@dataclass(frozen=True)
class Drawing:
    """A plot that is not written yet, with the attributes of :class:`Plot`."""

    name: str
    title: str
    caption: str
    topic: str
    figure: Figure


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without yellow, which is too pale for lines on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_WIDTH = 8.0
"""Width of every plot in inches."""
_DPI = 150
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is always available
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.markersize": 6,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.09,  # inches
    "figure.constrained_layout.h_pad": 0.07,
    "svg.hashsalt": "rim-peft",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """A method's colour, marker and line style."""

    color: str
    marker: str
    dash: Any

    @property
    def line(self) -> dict[str, Any]:
        """Return keywords for matplotlib's ``plot`` and ``errorbar``."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash}


def require_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plots: need matplotlib, which is not installed. Install it with: pip install 'rim-peft[compare]'"
        ) from error


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw in the report's style, and restore matplotlib's settings afterwards.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float) -> Figure:
    """Return an empty figure of a height in inches, outside matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and SVG, without dates and versions, so that equal plots give equal files."""
    figure.savefig(folder / f"{name}.png", format="png", dpi=_DPI, metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", format="svg", dpi=_DPI, metadata={"Date": None, "Creator": None})


def look(index: int) -> Look:
    """Return the look of a method by its place; the first 63 all differ in colour or marker."""
    return Look(COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)])


def looks(results: Results) -> dict[str, Look]:
    """Return every method's look, the same in all plots; the reference is first."""
    names = [method.name for method in results.methods]
    ordered = sorted(names, key=lambda name: name != results.reference)
    return {name: look(index) for index, name in enumerate(ordered)}


def shades(count: int) -> list[Look]:
    """Return looks for ordered things, such as numbers of steps: dark to light, distinct in grey too."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    places = [0.85 * index / max(1, count - 1) for index in range(count)]
    colors = [to_hex(colormaps["viridis"](place)) for place in places]
    return [
        Look(color, MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)]) for index, color in enumerate(colors)
    ]


def errors(scores: Sequence[Score]) -> list[list[float]]:
    """Return the distances from shares to the lower and upper ends of their 95 % intervals."""
    bounds = [(score.accuracy, *score.interval) for score in scores]
    return [[share - low for share, low, _ in bounds], [high - share for share, _, high in bounds]]


def plain(text: str, *, limit: int = 48) -> str:
    """Return a label for matplotlib: no formulas, no line breaks, limited length."""
    text = one_line(text)
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return text.replace("$", r"\$")


def share_axis(axes: Axes) -> None:
    """Make an axis of shares run from 0 to 1, with room for markers at both ends."""
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("accuracy (share)")


def spread(place: int, count: int, *, width: float) -> float:
    """Return the offset of one of several points that would otherwise overlap."""
    return 0.0 if count < 2 else width * (place / (count - 1) - 0.5)
