"""Plots of right answers: by method, and by number of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rim_peft.comparison.plots.plot import Drawing
from rim_peft.comparison.plots.style import errors, looks, new_figure, plain, share_axis, spread
from rim_peft.comparison.pooled import Method, Results, pool, pool_lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_accuracy(results: Results) -> list[Drawing]:
    """Every method's accuracy with its interval, and its seeds one by one."""
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
            "accuracy",
            figure,
        )
    ]


def draw_lengths(results: Results) -> list[Drawing]:
    """Accuracy by number of steps, one line a method; methods with the reference's compute in a panel of their own."""
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
            "accuracy",
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
