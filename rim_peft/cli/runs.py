"""``rim-peft runs``: list the runs below a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rim_peft.cli.console import complain, path, say
from rim_peft.escaping import json_text, one_line
from rim_peft.run_folders import RunSummary, list_runs

_WIDTH = 100
_COLUMNS = ("run", "state", "method", "base", "task", "score", "time", "tokens", "tok/s", "GPU MiB", "date")
_TEXTS = ("run", "state", "method", "base", "task", "date")
_LEAST = {"run": 12, "state": 24, "method": 6, "base": 8, "task": 6}
"""Widths down to which columns are cut if a line would be too long; after that, states are cut further."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", type=path, help="folder to search")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with every detail")


def more_help() -> str:
    """Return additional text for ``--help``: what the columns mean."""
    return (
        "The latest run comes first. finished: its adapter is there. running: a process holds its lock. diverged and\n"
        "failed: an error ended it. stopped: a signal or a kill ended it; resume=true continues it. damaged: a file\n"
        "cannot be read. Runs that are not finished show the stage and the step of their last checkpoint, and the\n"
        "best score so far. score: accuracy on the validation rows. time: of training, evaluation included. tokens:\n"
        "of the rows trained on. --json has names in full, errors and standard errors. Weights are not read, hidden\n"
        "folders are not searched, and links to folders are not followed."
    )


def run(args: argparse.Namespace) -> int:
    """List the runs."""
    runs, notes = list_runs(Path(args.folder))
    if args.json:
        say(json_text({"folder": args.folder, "runs": [run.to_dict() for run in runs], "notes": notes}, indent=2))
        return 0
    for line in render_runs(runs):
        say(line)
    for run in runs:
        if run.detail and run.state != "running":
            complain(f"{one_line(run.folder)}: {one_line(run.detail)}")
    for note in notes:
        complain(note)
    if not runs:
        complain(f"no runs in {args.folder}")
    return 0


def render_runs(runs: Sequence[RunSummary]) -> list[str]:
    """Return one line for each run, below the names of the columns; at most 100 characters each."""
    rows = [_cells(run) for run in runs]
    if len({row["date"][:4] for row in rows}) == 1:  # the year says nothing
        rows = [{**row, "date": row["date"][5:]} for row in rows]
    columns = [name for name in _COLUMNS if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    while sum(widths.values()) + len(widths) - 1 > _WIDTH:
        widest = max((name for name in columns if name in _LEAST), key=lambda name: widths[name] - _LEAST[name])
        if widths[widest] <= _LEAST[widest]:
            widest = "state"
        if widths[widest] <= 2:
            break
        widths[widest] -= 1
    heads = [{name: name for name in columns}] if rows else []
    return [
        " ".join(_fit(row[name], widths[name], is_text=name in _TEXTS) for name in columns).rstrip()
        for row in [*heads, *rows]
    ]


def _cells(run: RunSummary) -> dict[str, str]:
    state = run.state
    if run.stage is not None:
        state += f" {run.stage[:6]}"
    if run.step is not None:
        state += f" {run.step}/{run.max_steps or '?'}"
    texts = {"run": run.folder, "state": state, "method": run.method, "task": run.task}
    numbers = {
        "score": "" if run.accuracy is None else f"{run.accuracy:.3f}",
        "time": "" if run.seconds is None else _duration(run.seconds),
        "tokens": "" if run.num_tokens is None else _count(run.num_tokens),
        "tok/s": "" if run.tokens_per_second is None else _count(run.tokens_per_second),
        "GPU MiB": "" if run.peak_gpu_mib is None else f"{run.peak_gpu_mib:.0f}",
    }
    return {
        **{name: one_line(text or "") for name, text in texts.items()},
        "base": one_line((run.base or "").rstrip("/").rpartition("/")[2].partition("@")[0]),
        **{name: text[:7] for name, text in numbers.items()},  # more is not a figure of any run
        "date": one_line((run.started or "")[:10]),
    }


def _fit(text: str, width: int, *, is_text: bool) -> str:
    """Pad a text to a width, or cut its middle."""
    if len(text) > width:
        kept = width - 2
        text = f"{text[: kept // 3]}..{text[-(kept - kept // 3) :]}"
    return text.ljust(width) if is_text else text.rjust(width)


def _duration(seconds: float) -> str:
    """Return seconds as hours and minutes, or as minutes and seconds.

    >>> _duration(59.4), _duration(3725), _duration(400000)
    ('0m59', '1h02', '111h06')
    """
    minutes = int(seconds) // 60
    return f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}m{int(seconds) % 60:02}"


def _count(number: float) -> str:
    """Return a count with three digits.

    >>> _count(999), _count(948462), _count(12_340_000_000)
    ('999', '948k', '12.3G')
    """
    for sign in ("", "k", "M", "G"):
        if number < 999.5 or sign == "G":
            break
        number /= 1000
    return f"{number:.3g}{sign}" if number < 999.5 else f"{number:.0f}{sign}"
