"""A results document as tables, text and pictures, in Markdown and as one HTML page."""

from rim_peft.comparison.report.markup import render_markdown, render_page, rewrite_report, write_report

__all__ = ["render_markdown", "render_page", "rewrite_report", "write_report"]
