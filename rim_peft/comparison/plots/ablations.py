"""Plots of an ablation: accuracy against the values of one key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rim_peft.comparison.numbers import setting
from rim_peft.comparison.plots.plot import Drawing
from rim_peft.comparison.plots.style import COLORS, errors, new_figure, plain, shades, share_axis, spread
from rim_peft.comparison.pooled import Method, Results, pool, pool_lengths
from rim_peft.evaluation.accuracy import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 20.0  # a key whose largest value is so many times its smallest gets a logarithmic axis


def changed_keys(results: Results) -> list[str]:
    """Return the keys that methods depart in, in the table's order; several at once are joined by ``" + "``."""
    return list(dict.fromkeys(changed_key(m) for m in results.methods if m.name != results.reference))


def changed_key(method: Method) -> str:
    """Return the key that a method departs in; of several all, of none ``"other"``."""
    return " + ".join(method.changes) or "other"


def changed_value(method: Method) -> str:
    """Return its value as text; a method without changes is told by its label."""
    return ", ".join(setting(value) for value in method.changes.values()) or method.label


def topic(number: int) -> str:
    """Return the key of the report's part about the changed key with this number, from 1 on."""
    return f"ablation-{number}"


def draw_ablations(results: Results) -> list[Drawing]:
    """For every key that was changed: accuracy against its values, beside the shared setting."""
    if not results.is_ablation:
        return []
    return [_draw(results, key, number) for number, key in enumerate(changed_keys(results), start=1)]


def _draw(results: Results, key: str, number: int) -> Drawing:
    methods = [m for m in results.methods if m.name != results.reference and changed_key(m) == key]
    reference = next(m for m in results.methods if m.name == results.reference)
    if reference.changes and changed_key(reference) == key:
        methods = [reference, *methods]  # then its value is known too
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
    """Return the values of one key if all of them are numbers and differ."""
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
    """Draw the shared setting as a line, since its place among the values need not be known."""
    score = _overall(results, results.reference)
    if score is not None:
        axes.axhline(score.accuracy, color=COLORS[1], linestyle=(0, (6, 2)), linewidth=1.4, label="shared setting")
        axes.axhspan(*score.interval, color=COLORS[1], alpha=0.12, linewidth=0)


def _overall(results: Results, name: str) -> Score | None:
    rule = results.document["task"]["answer_rule"]
    return pool(run["accuracy"].get(rule) for run in results.runs(name))
