"""docs/supported.md, from the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.parity.subject import BASES, CONFIGS, FORMATS, Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "supported.md"

_SECTIONS = {"files": "Files", "adapters": "Adapters", "merging": "Merging", "running": "At work"}
_HEADER = """\
# What is supported

A RiM adapter does what a stock LoRA adapter of PEFT does, with its memory rows along. This page says on which bases, in
which formats and with which options that is tested, and what RiM refuses.

It is made by `python -m tests.parity.matrix`. Each cell is a test (`tests/parity/`): `make test` runs some, `make
test-slow` the others, and `python -m tests.parity.matrix --run` all of them.
"""
_BEHAVIOURS = """\
Numbers are those of bases on which a behaviour is tested: tiny models of each architecture, with tied and untied heads.
The first four columns are formats with default options, the others options."""
_REFUSED = """\
Stock LoRA does each of these; a memory without LoRA has no stock counterpart. RiM raises an error before anything is
computed."""


def render(
    pairs: Sequence[tuple[Any, Case]],
    departure: Callable[[Any, Case], Any],
    departures: Iterable[Any],
    refusals: Iterable[Any],
    stocks_own: Iterable[tuple[Any, str, str]],
) -> str:
    """The page's text.

    Args:
        pairs: all behaviours with the cells in which they are tried.
        departure: what is said of a behaviour in a cell.
        departures: all that is said.
        refusals: uses that RiM refuses.
        stocks_own: behaviours and configurations in which stock LoRA alone fails, and how.
    """
    found = [departure(*pair) for pair in pairs]
    num_stock = sum(one is not None and one.is_stocks is not None for one in found)
    num_refused = sum(one is not None and one.is_stocks is None for one in found)
    summary = (
        f"{len(found)} cells: {len(found) - num_stock - num_refused} work, {num_stock} fail with stock LoRA too, "
        f"{num_refused} are refused."
    )
    return "\n".join(
        [
            _HEADER,
            summary,
            "",
            "## Behaviours",
            "",
            _BEHAVIOURS,
            "",
            *_behaviour_table(pairs, departure),
            "",
            "## Bases",
            "",
            "Numbers are those of behaviours tested, with the default options.",
            "",
            *_base_table(pairs, departure),
            "",
            "## What stock LoRA cannot do either",
            "",
            *_departure_table([one for one in departures if one.is_stocks is not None]),
            "",
            "## Where stock LoRA fails and RiM does not",
            "",
            *_table(["use", "stock LoRA"], [[f"{_title(one)}; {config}", how] for one, config, how in stocks_own]),
            "",
            "## What RiM refuses",
            "",
            _REFUSED,
            "",
            *_departure_table([one for one in departures if one.is_stocks is None], refusals),
            "",
        ]
    )


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [_row(head), "|" + "---|" * len(head), *map(_row, rows)]


def _title(behaviour: Any) -> str:
    return (behaviour.__doc__ or behaviour.__name__).strip().rstrip(".")


def _cell(pairs: Sequence[tuple[Any, Case]], departure: Callable[[Any, Case], Any]) -> object:
    """How many of some tested cells work, or why none does."""
    departed = [one for pair in pairs if (one := departure(*pair)) is not None]
    if not departed:
        return len(pairs) or ""
    return "stock neither" if all(one.is_stocks for one in departed) else "refused"


def _behaviour_table(pairs: Sequence[tuple[Any, Case]], departure: Callable[[Any, Case], Any]) -> list[str]:
    columns = [("plain", name) for name in FORMATS] + [(name, None) for name in list(CONFIGS)[1:]]
    rows: list[list[object]] = []
    room = ""
    for behaviour in dict.fromkeys(behaviour for behaviour, _ in pairs):
        if (module := behaviour.__module__.rpartition(".")[2]) != room:
            room = module
            rows.append([f"**{_SECTIONS[room]}**", *[""] * len(columns)])
        own = [pair for pair in pairs if pair[0] is behaviour]
        rows.append([_title(behaviour), *[_cell(_of(own, *column), departure) for column in columns]])
    return _table(["behaviour", *FORMATS, *list(CONFIGS)[1:]], rows)


def _of(pairs: Sequence[tuple[Any, Case]], config: str, format_name: str | None) -> list[tuple[Any, Case]]:
    return [pair for pair in pairs if pair[1].config == config and format_name in (None, pair[1].format)]


def _base_table(pairs: Sequence[tuple[Any, Case]], departure: Callable[[Any, Case], Any]) -> list[str]:
    rows = []
    for base in BASES:
        own = [pair for pair in pairs if pair[1].base == base]
        rows.append([base.replace("-", ", "), *[_cell(_of(own, "plain", name), departure) for name in FORMATS]])
    return _table(["base", *FORMATS], rows)


def _departure_table(departures: Iterable[Any], refusals: Iterable[Any] = ()) -> list[str]:
    rows = [
        [f"{_title(one.behaviour)}; {', '.join(one.configs)}", f"`{_plain(one.error)}`", one.instead]
        for one in departures
    ]
    rows += [[one.what, f"`{_plain(one.error)}`", one.instead] for one in refusals]
    return _table(["use", "error", "instead"], rows)


def _plain(pattern: str) -> str:
    """An error's beginning as code in a table."""
    return pattern.removeprefix(".*").replace("`", "") + " ..."
