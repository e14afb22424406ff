"""A report as GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_peft.comparison.plots.plot import Plot
from rim_peft.comparison.report.assembly import build_report
from rim_peft.comparison.report.content import Bullets, Code, Part, Table
from rim_peft.escaping import fence
from rim_peft.escaping import markdown as escape


def render_markdown(results: Mapping[str, Any], plots: Sequence[Plot] | None = None) -> str:
    """Return the report of a results document as Markdown.

    Args:
        results: the document.
        plots: plots that were drawn of it; they are shown from their folder beside the file. None for a text
            without pictures.
    """
    report = build_report(results, plots)
    blocks = [f"# {escape(report.title)}"]
    for section in report.sections:
        blocks.append(f"## {escape(section.title)}")
        blocks += [_part(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _part(part: Part) -> str:
    if isinstance(part, str):
        return escape(part)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Code):
        return fence(part.text, "bash")
    if isinstance(part, Bullets):
        return "\n".join(f"* {escape(item)}" for item in part.items)
    return f"![{escape(part.caption)}]({part.folder.name}/{part.png.name})\n\n{escape(part.caption)}"


def _table(table: Table) -> str:
    marks = ["---" if place < table.num_text_columns else "---:" for place in range(len(table.columns))]
    lines = [_row(table.columns), f"|{'|'.join(marks)}|", *(_row(row) for row in table.rows)]
    return "\n\n".join([f"**{escape(table.caption)}**", "\n".join(lines), *(escape(note) for note in table.notes)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape(cell) for cell in cells)} |"
