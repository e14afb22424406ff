"""Plots of a model's blocks: readouts, chosen answers, probe, budget, controls, states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rim_peft.comparison.numbers import steps
from rim_peft.comparison.plots.style import Drawing, Look, errors, looks, new_figure, plain, shades, share_axis, spread
from rim_peft.comparison.results import Method, Results, group, mean, pool, pool_lengths
from rim_peft.evaluation.scores import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes


WAYS = {
    "final": "final",
    "vote": "vote",
    "confidence": "confidence",
    "probe": "probe",
    "any_block": "any block",
}
"""Ways to choose one answer from the readouts, and the oracle, with their names."""


def draw_blocks(results: Results) -> list[Drawing]:
    """Draw accuracy by block, one line for each number of steps, beside the answers chosen from the blocks."""
    return [_blocks(results, method, place) for place, method in enumerate(results.detailed("blocks"), start=1)]


def _blocks(results: Results, method: Method, number: int) -> Drawing:
    figure = new_figure(3.8)
    chosen = _chosen(results, method.name)
    left, right = figure.subplots(1, 2, width_ratios=(3, max(0.7, 0.4 * len(chosen))), sharey=True)
    parts = results.parts(method.name, "blocks")
    num_blocks = max(len(part["by_block"]) for part in parts)
    columns = [[part["by_block"][k] for part in parts if k < len(part["by_block"])] for k in range(num_blocks)]
    by_block = [{"all": pool(entry["all"] for entry in column), **pool_lengths(column)} for column in columns]
    keys = [*results.lengths, "all"]
    for index, (key, style) in enumerate(_styles(results.lengths)):
        offset = spread(index, len(keys), width=0.2)
        line = {**style.line, "linewidth": 2.2 if key == "all" else 1.3, "capsize": 2, "elinewidth": 0.8}
        shown = [(k + 1, scores[key]) for k, scores in enumerate(by_block) if scores.get(key)]
        _bars(left, shown, offset, label="all rows" if key == "all" else steps(key), **line)
        ways = [(place, scores[key]) for place, scores in enumerate(chosen.values()) if scores.get(key)]
        _bars(right, ways, 2 * offset, **{**line, "linestyle": "none"})
    left.set_xticks(range(1, num_blocks + 1))
    left.set_xlabel("block (number)")
    share_axis(left)
    right.set_xticks(range(len(chosen)), [WAYS[way] for way in chosen], rotation=30, ha="right")
    right.set_xlabel("answer chosen" if len(chosen) > 1 else "")
    right.set_xlim(-0.5, len(chosen) - 0.5)
    figure.legend(loc="outside lower center", ncols=min(6, len(keys)))
    return Drawing(
        f"blocks-{number}",
        f"Accuracy by block: {method.label}",
        f"{method.label}: share of right readouts after each block by number of steps (left), and of the answers that "
        "each way of selection picks from them, with the oracle any block (right); 95 % intervals.",
        "blocks",
        figure,
    )


def _chosen(results: Results, name: str) -> dict[str, dict[str, Score | None]]:
    """Return scores by way and number of steps; only the oracle without a selection."""
    parts = results.parts(name, "selection")
    found: dict[str, dict[str, Score | None]] = {}
    for way in WAYS:
        lengths = pool_lengths((part.get("by_length") or {}).get(way) for part in parts)
        overall = pool(part.get(way) for part in parts)
        if way == "any_block" and overall is None:
            blocks = results.parts(name, "blocks")
            overall = pool(part["any_block"] for part in blocks)
        if way == "any_block" and not lengths:
            lengths = pool_lengths(part.get("any_block_by_length") for part in results.parts(name, "blocks"))
        if overall is not None:
            found[way] = {"all": overall, **lengths}
    return found


def _styles(lengths: list[str]) -> Iterator[tuple[str, Look]]:
    yield from zip(lengths, shades(len(lengths)), strict=True)
    yield "all", Look("#000000", "o", "-")


def draw_probe(results: Results) -> list[Drawing]:
    """Draw the probe's AUROC by block, one line per method."""
    methods = results.having("probe")
    if not methods:
        return []
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    num_blocks = 1
    for place, method in enumerate(methods):
        parts = [part["auroc_by_block"] for part in results.parts(method.name, "probe")]
        num_blocks = max(num_blocks, *(len(part) for part in parts))
        by_block = [[part[k] for part in parts if k < len(part) and part[k] is not None] for k in range(num_blocks)]
        shown = [(k + 1 + spread(place, len(methods), width=0.15), values) for k, values in enumerate(by_block)]
        shown = [(x, values) for x, values in shown if values]
        means = [sum(values) / len(values) for _, values in shown]
        low = [value - min(values) for value, (_, values) in zip(means, shown, strict=True)]
        high = [max(values) - value for value, (_, values) in zip(means, shown, strict=True)]
        label = plain(method.label, limit=34)
        style = looks(results)[method.name].line
        axes.errorbar([x for x, _ in shown], means, yerr=[low, high], capsize=2, elinewidth=1, label=label, **style)
    axes.axhline(0.5, color="#555555", linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(1, num_blocks + 1))
    axes.set_xlabel("block (number)")
    axes.set_ylabel("AUROC (1 = perfect, 0.5 = chance)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = (
        "How well a linear probe on the blocks' hidden states tells each block's right readouts from its wrong ones on "
        "the test rows (area under the ROC curve): mean over seeds, bars from the lowest to the highest seed."
    )
    return [Drawing("probe", "Probe by block", caption, "probe", figure)]


def draw_budget(results: Results) -> list[Drawing]:
    """Draw accuracy and time to the first token against the number of blocks."""
    methods = results.having("budget")
    if not methods:
        return []
    figure = new_figure(5.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    counts: set[int] = set()
    for place, method in enumerate(methods):
        budgets = group(results.parts(method.name, "budget"), lambda entry: entry["num_blocks"])
        style = {**looks(results)[method.name].line, "label": plain(method.label, limit=44)}
        shown = [
            (count, score) for count, entries in budgets.items() if (score := pool(e["accuracy"] for e in entries))
        ]
        _bars(top, shown, spread(place, len(methods), width=0.2), capsize=3, elinewidth=1, **style)
        times = [(count, mean(e.get("first_token_ms") for e in entries)) for count, entries in budgets.items()]
        times = [(count, value) for count, value in times if value is not None]
        bottom.plot([count for count, _ in times], [value for _, value in times], **style)
        counts |= set(budgets)
    share_axis(top)
    bottom.set_ylabel("time to first token (ms)")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("blocks at inference (number)")
    bottom.set_xticks(sorted(counts))
    if len(methods) > 1:
        figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    caption = (
        "Share of right answers with 95 % intervals (top) and milliseconds to the first answer token (bottom) against "
        "the number of blocks that a trained adapter is given."
    )
    return [Drawing("budget", "Accuracy and time by number of blocks", caption, "budget", figure)]


def draw_controls(results: Results) -> list[Drawing]:
    """Draw accuracy with disturbed blocks, and how often the answer follows the replacements."""
    return [_controls(results, method, place) for place, method in enumerate(results.having("controls"), start=1)]


def _controls(results: Results, method: Method, number: int) -> Drawing:
    controls = group(results.parts(method.name, "controls"), lambda entry: entry["name"])
    figure = new_figure(1.5 + 0.42 * len(controls))
    axes = figure.add_subplot()
    style = looks(results)[method.name]
    rule = results.document["task"]["answer_rule"]
    intact = pool(run["accuracy"].get(rule) for run in results.runs(method.name))
    if intact is not None:
        axes.axvline(intact.accuracy, color="#000000", linestyle=(0, (4, 2)), linewidth=1.3, label="nothing disturbed")
    right = [(place, pool(e["accuracy"] for e in entries)) for place, entries in enumerate(controls.values())]
    follows = [(place, pool(e.get("follows") for e in entries)) for place, entries in enumerate(controls.values())]
    shared = {"linestyle": "none", "capsize": 3, "elinewidth": 1, "markersize": 7}
    _across(axes, right, -0.12, color=style.color, marker="o", label="right answers", **shared)
    hollow = {"color": "#000000", "marker": "D", "markerfacecolor": "white"}
    _across(axes, follows, 0.12, label="answers that follow what was put in", **hollow, **shared)
    axes.set_yticks(range(len(controls)), [plain(str(name)) for name in controls])
    axes.set_ylim(len(controls) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of test rows")
    figure.legend(loc="outside lower center", ncols=3)
    return Drawing(
        f"controls-{number}",
        f"Controls: {method.label}",
        f"{method.label}: share of right answers when the blocks are disturbed, and of answers that follow what was "
        "put in their place, with 95 % intervals; the dashed line is the accuracy with nothing disturbed.",
        "controls",
        figure,
    )


def _bars(axes: Axes, shown: list[tuple[int, Any]], offset: float, **keywords: Any) -> None:
    if shown:
        scores = [score for _, score in shown]
        places = [place + offset for place, _ in shown]
        axes.errorbar(places, [score.accuracy for score in scores], yerr=errors(scores), **keywords)


def _across(axes: Axes, shown: list[tuple[int, Score | None]], offset: float, **keywords: Any) -> None:
    there = [(place + offset, score) for place, score in shown if score is not None]
    if there:
        scores = [score for _, score in there]
        shares = [score.accuracy for score in scores]
        axes.errorbar(shares, [place for place, _ in there], xerr=errors(scores), **keywords)


def draw_states(results: Results) -> list[Drawing]:
    """Draw the states by block, and the movement of their means during training."""
    found = results.document.get("representations") or {}
    drawn = []
    if (found.get("blocks") or {}).get("points"):
        drawn.append(_by_block(found["blocks"]))
    if (found.get("training") or {}).get("points"):
        drawn.append(_over_training(found["training"]))
    return drawn


def _by_block(part: Mapping[str, Any]) -> Drawing:
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    for block, style, points in _panels(part["points"]):
        for is_right in (True, False):
            chosen = [point for point in points if bool(point["right"]) is is_right]
            axes.scatter(
                [point["x"] for point in chosen],
                [point["y"] for point in chosen],
                s=22,
                marker=style.marker,
                facecolors=style.color if is_right else "none",
                edgecolors=style.color,
                linewidths=0.9,
                alpha=0.75,
                label=f"block {block}" if is_right else None,
                rasterized=True,  # thousands of points would make a large page
            )
    axes.scatter([], [], marker="o", facecolors="none", edgecolors="#000000", label="hollow: wrong readout")
    _name_axes(axes, part["explained_variance"])
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = (
        "States at the ends of the blocks on their first two principal components, one point for each test question "
        "and block; filled where that block's readout is right, hollow where it is wrong."
    )
    return Drawing("states-by-block", "The blocks' states", caption, "representations", figure)


def _over_training(part: Mapping[str, Any]) -> Drawing:
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    for block, style, points in _panels(part["points"]):
        moments = group([points], lambda point: (point["stage"], point["step"]))
        centers = [(_mean(at, "x"), _mean(at, "y")) for at in moments.values()]
        axes.plot(
            [x for x, _ in centers],
            [y for _, y in centers],
            label=f"block {block}",
            alpha=0.9,
            **style.line,
        )
        axes.plot(*centers[0], marker=style.marker, markersize=9, markerfacecolor="white", color=style.color)
    first, last = part["points"][0], part["points"][-1]
    axes.plot([], [], linestyle="none", marker="o", markerfacecolor="white", color="#000000", label="hollow: first")
    _name_axes(axes, part["explained_variance"])
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = (
        f"Mean state of every block on the first two principal components, from step {first['step']} of "
        f"{first['stage']} (hollow) to step {last['step']} of {last['stage']}, one marker for each checkpoint."
    )
    return Drawing("states-over-training", "The blocks' states over training", caption, "representations", figure)


def _panels(points: Sequence[Mapping[str, Any]]) -> list[tuple[int, Look, list[Mapping[str, Any]]]]:
    blocks = sorted({point["block"] for point in points})
    styles = shades(len(blocks))
    return [
        (block, style, [point for point in points if point["block"] == block])
        for block, style in zip(blocks, styles, strict=True)
    ]


def _mean(points: Sequence[Mapping[str, Any]], axis: str) -> float:
    return sum(float(point[axis]) for point in points) / len(points)


def _name_axes(axes: Axes, explained: Sequence[float]) -> None:
    shares = [f" ({100 * value:.0f} % of the variance)" for value in explained] + ["", ""]
    axes.set_xlabel(f"principal component 1{shares[0]}")
    axes.set_ylabel(f"principal component 2{shares[1]}")
