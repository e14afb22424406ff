"""Plots of the blocks' hidden states on their first two principal components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rim_peft.comparison.plots.plot import Drawing
from rim_peft.comparison.plots.style import Look, new_figure, shades
from rim_peft.comparison.pooled import Results, group

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_states(results: Results) -> list[Drawing]:
    """The states by block, and how their means move over training."""
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
    for block, style, points in _blocks(part["points"]):
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
                rasterized=True,  # thousands of points would make a heavy page
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
    for block, style, points in _blocks(part["points"]):
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


def _blocks(points: Sequence[Mapping[str, Any]]) -> list[tuple[int, Look, list[Mapping[str, Any]]]]:
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
