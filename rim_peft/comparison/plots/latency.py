"""The plot of times to an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rim_peft.comparison.numbers import ratio
from rim_peft.comparison.plots.plot import Drawing
from rim_peft.comparison.plots.style import look, looks, new_figure, plain
from rim_peft.comparison.pooled import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TIMES = {"first_token": "time to first token (ms)", "answer": "time to whole answer (ms)"}


def draw_latency(results: Results) -> list[Drawing]:
    """Milliseconds of every method, a panel for each batch size and prompt length, with ratios as text."""
    rows: list[Mapping[str, Any]] = list(results.document.get("latency") or [])
    if not rows:
        return []
    cases = list(dict.fromkeys((row["batch_size"], row["prompt_tokens"]) for row in rows))
    sizes = [sum((row["batch_size"], row["prompt_tokens"]) == case for row in rows) for case in cases]
    figure = new_figure(0.7 + sum(0.75 + 0.27 * size for size in sizes))
    grid = figure.subplots(len(cases), 2, sharex="col", sharey="row", squeeze=False, height_ratios=sizes)
    for case, panels in zip(cases, grid, strict=True):
        chosen = [row for row in rows if (row["batch_size"], row["prompt_tokens"]) == case]
        for time, axes in zip(_TIMES, panels, strict=True):
            _panel(axes, results, chosen, time)
        panels[0].set_title(f"batch of {case[0]}, prompts of {case[1]} tokens", loc="left")
    for axes, label in zip(grid[-1], _TIMES.values(), strict=True):
        axes.set_xlabel(label)
    caption = (
        "Median milliseconds to the first answer token (left) and to the whole answer (right) of every method, on a "
        "logarithmic axis; the numbers are ratios to answering at once."
    )
    return [Drawing("latency", "Time to an answer", caption, "latency", figure)]


def _panel(axes: Axes, results: Results, rows: list[Mapping[str, Any]], time: str) -> None:
    from matplotlib.ticker import LogLocator

    styles = looks(results)
    for place, row in enumerate(rows):
        style = styles.get(row["name"], look(6))
        value = row[f"{time}_ms"]
        axes.plot([value], [place], linestyle="none", markersize=7, color=style.color, marker=style.marker)
        axes.annotate(
            ratio(row.get(f"{time}_ratio")),
            (value, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [plain(results.label(row["name"]), limit=34) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
