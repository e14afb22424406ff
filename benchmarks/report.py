"""Rows of results, as a table and as a JSON document."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from benchmarks.measure import Spread, ratio, spread
from rim_peft.run.record import describe_hardware, describe_versions

_WIDTH = 118


@dataclass(frozen=True)
class Measured:
    """The measurement of one way: name, median and quartiles, and unit (``ms``, ``tokens/s``, ``MiB``)."""

    name: str
    spread: Spread
    unit: str

    @classmethod
    def milliseconds(cls, name: str, seconds: Sequence[float]) -> Measured:
        """Make a measurement from the seconds of a way's rounds."""
        return cls(name, spread([1000 * sample for sample in seconds]), "ms")


@dataclass(frozen=True)
class Target:
    """The target of a figure: the rule in words, and as a predicate of figure and bound."""

    text: str
    holds: Callable[[float, float], bool]


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        benchmark: the benchmark's name.
        case: the sizes, by name.
        ways: the two ways, ours first.
        figure: the judged figure, with quartiles over rounds.
        figure_name: its name, such as ``"separate / one pass"``.
        bound: the best possible figure, from counted operations or tokens.
        bound_text: how the bound was counted.
        target: the figure's target; None if it is only reported.
        num_rounds: rounds behind the medians.
        note: other information for the reader.
    """

    benchmark: str
    case: dict[str, Any]
    ways: tuple[Measured, Measured]
    figure: Spread
    figure_name: str
    bound: float
    bound_text: str
    target: Target | None = None
    num_rounds: int = 1
    note: str = ""

    @classmethod
    def of_times(
        cls,
        benchmark: str,
        case: dict[str, Any],
        samples: Mapping[str, Sequence[float]],
        names: tuple[str, str],
        *,
        is_cost: bool = False,
        **fields: Any,
    ) -> Row:
        """Compare the seconds of two ways, ours first: theirs as a multiple of ours; with ``is_cost`` the reverse."""
        ours, theirs = names
        above_line, below_line = (ours, theirs) if is_cost else (theirs, ours)
        return cls(
            benchmark=benchmark,
            case=case,
            ways=(Measured.milliseconds(ours, samples[ours]), Measured.milliseconds(theirs, samples[theirs])),
            figure=ratio(samples[above_line], samples[below_line]),
            figure_name=f"{above_line} / {below_line}",
            num_rounds=len(samples[ours]),
            **fields,
        )

    @property
    def share_of_bound(self) -> float | None:
        """The median relative to the bound: 1.0 is the bound itself; None for a bound of 0."""
        return self.figure.median / self.bound if self.bound else None

    @property
    def is_reached(self) -> bool | None:
        """Whether the median reaches the target; None without a target."""
        return None if self.target is None else self.target.holds(self.figure.median, self.bound)

    def to_dict(self) -> dict[str, Any]:
        """Return the row for the JSON document."""
        return {
            "benchmark": self.benchmark,
            "case": self.case,
            "ways": [asdict(way) for way in self.ways],
            "figure": {"name": self.figure_name, **asdict(self.figure)},
            "bound": {"value": self.bound, "counted": self.bound_text},
            "share_of_bound": self.share_of_bound,
            "target": None if self.target is None else self.target.text,
            "reached": self.is_reached,
            "num_rounds": self.num_rounds,
            "note": self.note,
        }


def at_least(share: float) -> Target:
    """Target of a figure that should be large: at least this share of its bound."""
    return Target(f"at least {share:g} of the bound", lambda figure, bound: figure >= share * bound)


def at_most(times: float) -> Target:
    """Target of a figure that should be small: at most this many times its bound."""
    return Target(f"at most {times:g} times the bound", lambda figure, bound: figure <= times * bound)


def above(limit: float, text: str) -> Target:
    """Target of a figure that should be at least ``limit``, whatever its bound."""
    return Target(text, lambda figure, bound: figure >= limit)


def below(limit: float, text: str) -> Target:
    """Target of a figure that should stay below ``limit``, whatever its bound."""
    return Target(text, lambda figure, bound: figure < limit)


def within(share: float) -> Target:
    """Target of an estimate: at most this share off its bound, in either direction."""
    return Target(f"within {share:.0%} of the bound", lambda figure, bound: abs(figure / bound - 1) <= share)


def to_document(
    rows: Iterable[Row], *, command: Sequence[str], device: str, is_complete: bool, seconds: float
) -> dict[str, Any]:
    """Return rows with their context: when, where, with what and how they were measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "device": device,
        "complete": is_complete,
        "seconds": round(seconds, 1),
        "hardware": describe_hardware(),
        "versions": describe_versions(),
        "rows": [row.to_dict() for row in rows],
    }


def to_table(rows: Iterable[Row]) -> str:
    """Return rows as text, grouped by what they compare."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    return "\n\n".join(_render(group) for group in groups.values())


def _group(row: Row) -> tuple[str, ...]:
    names = (way.name for way in row.ways)
    return (row.benchmark, *names, row.figure_name, row.bound_text, row.target.text if row.target else "")


def _render(rows: list[Row]) -> str:
    first = rows[0]
    common = {name: value for name, value in first.case.items() if all(row.case.get(name) == value for row in rows)}
    ours, theirs = (way.name for way in first.ways)
    heading = ["", ours, theirs, first.figure_name, "bound", "of bound", "target"]
    cells = [heading, *(_cells(row, common) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    target = first.target.text if first.target else "none, a report"
    lines = [
        f"{first.benchmark}  {_assignments(common)}",
        *_wrapped(f"bound: {first.bound_text}; target: {target}"),
    ]
    for line, row in zip(cells, [None, *rows], strict=True):
        label, *numbers = zip(line, widths, strict=True)
        aligned = [f"  {label[0].ljust(label[1])}", *(text.rjust(width) for text, width in numbers)]
        lines.append("  ".join(aligned).rstrip())
        if row is not None and row.note:
            lines.extend(_wrapped(row.note, indent=6))
    return "\n".join(lines)


def _cells(row: Row, common: dict[str, Any]) -> list[str]:
    share = "-" if row.share_of_bound is None else f"{row.share_of_bound:.2f}"
    reached = {None: "-", True: "reached", False: "missed"}[row.is_reached]
    case = _assignments({name: value for name, value in row.case.items() if name not in common})
    ways = [f"{_text(way.spread)} {way.unit}" for way in row.ways]
    return [case, *ways, _text(row.figure), _number(row.bound), share, reached]


def _assignments(case: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items())


def _wrapped(text: str, *, indent: int = 2) -> list[str]:
    return textwrap.wrap(text, width=_WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _text(spread: Spread) -> str:
    if spread.lower == spread.upper:
        return _number(spread.median)
    return f"{_number(spread.median)} ({_number(spread.lower)}-{_number(spread.upper)})"


def _number(value: float) -> str:
    """Return three significant digits, without exponents.

    >>> [_number(value) for value in (0.00123, 1.0, 12.34, 12345.6)]
    ['0.0012', '1.00', '12.3', '12346']
    """
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or not size else 4
    return f"{value:.{digits}f}"
