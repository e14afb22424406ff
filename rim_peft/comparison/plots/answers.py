"""Plots of accuracy by method, number of steps and changed key, and of the time to an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rim_peft.comparison.numbers import ratio, setting
from rim_peft.comparison.plots.style import (
    COLORS,
    Drawing,
    errors,
    look,
    looks,
    new_figure,
    plain,
    shades,
    share_axis,
    spread,
)
from rim_peft.comparison.results import Method, Results, pool, pool_lengths
from rim_peft.evaluation.scores import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_accuracy(results: Results) -> list[Drawing]:
    """Draw every method's accuracy with its interval, and the single seeds."""
    rule = results.document["task"]["answer_rule"]
    methods = [method for method in results.methods if results.runs(method.name)]
    figure = new_figure(1.1 + 0.38 * len(methods))
    axes = figure.add_subplot()
    styles = looks(results)
    for place, method in enumerate(methods):
        scores = [run["accuracy"][rule] for run in results.runs(method.name)]
        pooled = pool(scores)
        if pooled is None:
            continue
        style = styles[method.name]
        axes.errorbar(
            [pooled.accuracy],
            [place],
            xerr=errors([pooled]),
            color=style.color,
            marker=style.marker,
            markersize=8,
            capsize=4,
            linestyle="none",
        )
        if len(scores) > 1:
            axes.plot(
                [score["accuracy"] for score in scores],
                [place + 0.24] * len(scores),
                linestyle="none",
                marker="|",
                markersize=7,
                markeredgewidth=1.5,
                color=style.color,
            )
        at_the_edge: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9.5}
        axes.annotate(f"{pooled.accuracy:.3f}", (1.01, place), **at_the_edge)
    axes.set_yticks(range(len(methods)), [plain(method.label) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("accuracy (share of right answers)")
    return [
        Drawing(
            "accuracy",
            "Accuracy by method",
            f"Share of right answers of every method on the test rows (rule {rule}), pooled over seeds, with 95 % "
            "intervals; small strokes are single seeds.",
            "result",
            figure,
        )
    ]


def draw_lengths(results: Results) -> list[Drawing]:
    """Draw accuracy by number of steps, one line per method; methods with the reference's compute get their own
    panel."""
    if not results.lengths:
        return []
    own = [method for method in results.methods if method.view != "compute"]
    panels = [
        ("the recipe's own steps" if any(m.view == "own" for m in own) else "same number of samples", own),
        ("same compute", [method for method in results.methods if method.view == "compute"]),
    ]
    panels = [(title, methods) for title, methods in panels if methods]
    reference = [m for m in results.methods if m.name == results.reference]
    panels = [(title, methods if reference[0] in methods else [*methods, *reference]) for title, methods in panels]
    if results.is_ablation:
        panels = [("", reference)]
    figure = new_figure(sum(max(3.2, 1.0 + 0.22 * len(methods)) for _, methods in panels))
    for place, (title, methods) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        _lengths(axes, results, methods)
        if len(panels) > 1:
            axes.set_title(title, loc="left")
        if len(methods) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    whose = "the shared setting" if results.is_ablation else "every method"
    return [
        Drawing(
            "accuracy-by-length",
            "Accuracy by number of steps",
            f"Share of right answers of {whose} by the number of reasoning steps that a question needs, with 95 % "
            "intervals.",
            "lengths",
            figure,
        )
    ]


def _lengths(axes: Axes, results: Results, methods: list[Method]) -> None:
    styles = looks(results)
    for place, method in enumerate(methods):
        scores = pool_lengths(run.get("by_length") for run in results.runs(method.name))
        if not scores:
            continue
        offset = spread(place, len(methods), width=0.24)
        axes.errorbar(
            [int(length) + offset for length in scores],
            [score.accuracy for score in scores.values()],
            yerr=errors(list(scores.values())),
            label=plain(method.label, limit=42),
            capsize=2,
            elinewidth=1,
            **styles[method.name].line,
        )
    places = [int(length) for length in results.lengths]
    axes.set_xticks(places)
    axes.set_xlim(min(places) - 0.25, max(places) + 0.25)
    axes.set_xlabel("reasoning steps (number)")
    share_axis(axes)


_TIMES = {"first_token": "time to first token (ms)", "answer": "time to whole answer (ms)"}


def draw_latency(results: Results) -> list[Drawing]:
    """Draw the milliseconds of every method, a panel for each batch size and prompt length, with ratios as text."""
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


_LOG_FROM = 20.0  # the axis is logarithmic if the largest value is at least this many times the smallest


def changed_keys(results: Results) -> list[str]:
    """Return the keys that methods change, in the order of the table; several of one method are joined by ``" + "``."""
    return list(dict.fromkeys(changed_key(m) for m in results.methods if m.name != results.reference))


def changed_key(method: Method) -> str:
    """Return the key that a method changes; several are joined, and ``"other"`` stands for none."""
    return " + ".join(method.changes) or "other"


def changed_value(method: Method) -> str:
    """Return the changed value as text; the label for a method without changes."""
    return ", ".join(setting(value) for value in method.changes.values()) or method.label


def topic(number: int) -> str:
    """Return the key of the report's section about the changed key with this number, counted from 1."""
    return f"ablation-{number}"


def draw_ablations(results: Results) -> list[Drawing]:
    """Draw accuracy against the values of every changed key, beside the shared setting."""
    if not results.is_ablation:
        return []
    return [_draw(results, key, number) for number, key in enumerate(changed_keys(results), start=1)]


def _draw(results: Results, key: str, number: int) -> Drawing:
    methods = [m for m in results.methods if m.name != results.reference and changed_key(m) == key]
    reference = next(m for m in results.methods if m.name == results.reference)
    if reference.changes and changed_key(reference) == key:
        methods = [reference, *methods]  # the reference's value is known too, then
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    values = _numbers(methods)
    if values is not None:
        methods = [method for _, method in sorted(zip(values, methods, strict=True), key=lambda pair: pair[0])]
        values = sorted(values)
    _points(axes, results, methods, values)
    _shared(axes, results)
    axes.set_xlabel(plain(key, limit=80))
    share_axis(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return Drawing(
        f"ablation-{number}",
        f"Accuracy by {key}",
        f"Share of right answers against {key}, over all test rows and by number of steps, with 95 % intervals; the "
        "line with the band is the shared setting.",
        topic(number),
        figure,
    )


def _numbers(methods: list[Method]) -> list[float] | None:
    """Return the values of one key if they are all different numbers."""
    values: list[Any] = [value for method in methods for value in method.changes.values()]
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(values) != len(methods) or len(set(numbers)) != len(methods):
        return None
    return [float(value) for value in numbers]


def _points(axes: Axes, results: Results, methods: list[Method], values: list[float] | None) -> None:
    is_log = values is not None and min(values) > 0 and max(values) / min(values) >= _LOG_FROM
    places = list(range(len(methods))) if values is None or is_log else values
    span = (max(places) - min(places)) or 1.0
    lengths = results.lengths
    for index, (length, style) in enumerate(zip(lengths, shades(len(lengths)), strict=True)):
        offset = spread(index, len(lengths), width=0.03 * span * min(len(lengths), 5))
        found = [pool_lengths(run.get("by_length") for run in results.runs(m.name)).get(length) for m in methods]
        shown = [(place + offset, score) for place, score in zip(places, found, strict=True) if score is not None]
        line = {**style.line, "linestyle": style.dash if values is not None else "none"}
        _bars(axes, shown, label=f"{length} step{'' if length == '1' else 's'}", alpha=0.85, elinewidth=0.8, **line)
    found = [_overall(results, method.name) for method in methods]
    shown = [(place, score) for place, score in zip(places, found, strict=True) if score is not None]
    line = {"color": "black", "marker": "o", "linestyle": "-" if values is not None else "none", "linewidth": 2.2}
    _bars(axes, shown, label="all rows", markersize=8, **line)
    axes.set_xticks(places, [plain(changed_value(method), limit=24) for method in methods])
    axes.set_xlim(min(places) - 0.12 * span, max(places) + 0.12 * span)


def _bars(axes: Axes, shown: list[tuple[float, Score]], **keywords: Any) -> None:
    if shown:
        scores = [score for _, score in shown]
        shares = [score.accuracy for score in scores]
        axes.errorbar([place for place, _ in shown], shares, yerr=errors(scores), capsize=2, **keywords)


def _shared(axes: Axes, results: Results) -> None:
    """Draw the shared setting as a line: its place among the values may be unknown."""
    score = _overall(results, results.reference)
    if score is not None:
        axes.axhline(score.accuracy, color=COLORS[1], linestyle=(0, (6, 2)), linewidth=1.4, label="shared setting")
        axes.axhspan(*score.interval, color=COLORS[1], alpha=0.12, linewidth=0)


def _overall(results: Results, name: str) -> Score | None:
    rule = results.document["task"]["answer_rule"]
    return pool(run["accuracy"].get(rule) for run in results.runs(name))
