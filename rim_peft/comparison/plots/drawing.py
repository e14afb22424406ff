"""Draw all plots for which a results document has figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rim_peft.comparison.plots.answers import draw_ablations, draw_accuracy, draw_latency, draw_lengths
from rim_peft.comparison.plots.blocks import draw_blocks, draw_budget, draw_controls, draw_probe, draw_states
from rim_peft.comparison.plots.style import Drawing, Plot, plain, plot_style, save
from rim_peft.comparison.results import Results
from rim_peft.run.output_folder import write_files

_DRAW: tuple[Callable[[Results], list[Drawing]], ...] = (
    draw_accuracy,
    draw_lengths,
    draw_ablations,
    draw_blocks,
    draw_probe,
    draw_budget,
    draw_controls,
    draw_latency,
    draw_states,
)


def draw_plots(results: Mapping[str, Any], folder: Path) -> list[Plot]:
    """Draw all plots of a results document as PNG and SVG; the same document gives the same bytes.

    Args:
        results: the document.
        folder: where the files go; created if missing.

    Returns:
        The plots in the order of the report.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with plot_style():
        drawings = [drawing for draw in _DRAW for drawing in draw(Results(results))]
        folder.mkdir(parents=True, exist_ok=True)

        def save_all(partial: Path) -> None:
            for drawing in drawings:
                drawing.figure.suptitle(plain(drawing.title, limit=90), fontsize=11.5)
                save(drawing.figure, partial, drawing.name)

        write_files(folder, save_all, last="")
    return [Plot(one.name, one.title, one.caption, one.topic, folder) for one in drawings]
