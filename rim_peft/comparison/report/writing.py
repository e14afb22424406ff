"""The report's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rim_peft.comparison.plots import draw_plots
from rim_peft.comparison.report.markdown import render_markdown
from rim_peft.comparison.report.page import render_page
from rim_peft.training.files import write_text

MARKDOWN = "results.md"
PAGE = "results.html"
PLOTS = "plots"


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.md``, ``results.html`` and ``plots/`` to a folder, each at once; old ones are replaced.

    Args:
        results: the results document.
        folder: where they go; it is made if it is not there.

    Raises:
        ImportError: matplotlib is not installed; nothing is written then.
    """
    plots = draw_plots(results, folder / PLOTS)
    write_text(folder / MARKDOWN, render_markdown(results, plots))
    write_text(folder / PAGE, render_page(results, plots))
