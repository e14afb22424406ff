"""A results document as tables, text and pictures: Markdown and one HTML page."""

from rim_peft.comparison.report.markdown import render_markdown
from rim_peft.comparison.report.page import render_page
from rim_peft.comparison.report.writing import write_report

__all__ = ["render_markdown", "render_page", "write_report"]
