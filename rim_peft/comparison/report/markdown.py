"""A report as GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rim_peft.comparison.plots.plot import Plot
from rim_peft.comparison.report.assembly import build_report
from rim_peft.comparison.report.content import Bullets, Code, Part, Table


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


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in a table too.

    >>> print(escape("a|b <i> *c* d_e _f_"))
    a\\|b \\<i\\> \\*c\\* d_e \\_f\\_
    """
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", r"\\_", text)


def _part(part: Part) -> str:
    if isinstance(part, str):
        return escape(part)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Code):
        return _code(part.text)
    if isinstance(part, Bullets):
        return "\n".join(f"* {escape(item)}" for item in part.items)
    return f"![{escape(part.caption)}]({part.folder.name}/{part.png.name})\n\n{escape(part.caption)}"


def _table(table: Table) -> str:
    marks = ["---" if place < table.num_text_columns else "---:" for place in range(len(table.columns))]
    lines = [_row(table.columns), f"|{'|'.join(marks)}|", *(_row(row) for row in table.rows)]
    return "\n\n".join([f"**{escape(table.caption)}**", "\n".join(lines), *(escape(note) for note in table.notes)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape(cell) for cell in cells)} |"


def _code(text: str) -> str:
    """A fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{text}\n{fence}"
