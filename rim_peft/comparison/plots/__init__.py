"""Plots of a results document."""

from rim_peft.comparison.plots.drawing import draw_plots
from rim_peft.comparison.plots.style import Plot, require_matplotlib

__all__ = ["Plot", "draw_plots", "require_matplotlib"]
