"""Write a report as GitHub's Markdown, and as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rim_peft.comparison.plots import draw_plots
from rim_peft.comparison.plots.style import Plot
from rim_peft.comparison.report.assembly import build_report
from rim_peft.comparison.report.content import Bullets, Code, Part, Report, Section, Table
from rim_peft.escaping import fence
from rim_peft.escaping import markdown as escape_markdown
from rim_peft.escaping import page as escape_page
from rim_peft.training.files import write_text


def render_markdown(results: Mapping[str, Any], plots: Sequence[Plot] | None = None) -> str:
    """Return the report of a results document as Markdown.

    Args:
        results: the document.
        plots: plots drawn of it, shown from their folder beside the file; None for a report without pictures.
    """
    report = build_report(results, plots)
    blocks = [f"# {escape_markdown(report.title)}"]
    for section in report.sections:
        blocks.append(f"## {escape_markdown(section.title)}")
        blocks += [_write_part(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _write_part(part: Part) -> str:
    if isinstance(part, str):
        return escape_markdown(part)
    if isinstance(part, Table):
        return _write_table(part)
    if isinstance(part, Code):
        return fence(part.text, "bash")
    if isinstance(part, Bullets):
        return "\n".join(f"* {escape_markdown(item)}" for item in part.items)
    return f"![{escape_markdown(part.caption)}]({part.folder.name}/{part.png.name})\n\n{escape_markdown(part.caption)}"


def _write_table(table: Table) -> str:
    marks = ["---" if place < table.num_text_columns else "---:" for place in range(len(table.columns))]
    lines = [_row(table.columns), f"|{'|'.join(marks)}|", *(_row(row) for row in table.rows)]
    return "\n\n".join(
        [f"**{escape_markdown(table.caption)}**", "\n".join(lines), *(escape_markdown(note) for note in table.notes)]
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape_markdown(cell) for cell in cells)} |"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<nav aria-label="Contents"><ol>
{contents}
</ol></nav>
<main>
{sections}
</main>
</body>
</html>
"""

_STYLE = """
:root { --text: #1a1a1a; --soft: #555; --paper: #fff; --line: #c8c8c8; --band: #f3f5f7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #b4b4b4; --paper: #16181b; --line: #4a4f55; --band: #21252a; --link: #82b8f2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.5rem 4rem; max-width: 72rem; color: var(--text); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
a { color: var(--link); }
nav ol { columns: 16rem; padding-left: 1.5rem; }
pre { padding: .75rem 1rem; background: var(--band); overflow-x: auto; }
.table { overflow-x: auto; margin: 1.25rem 0 .25rem; }
.table:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
tbody th { font-weight: 500; min-width: 9rem; }
tbody tr:nth-child(even) { background: var(--band); }
th.words, td.words { text-align: left; overflow-wrap: break-word; }
.note { margin: .2rem 0; color: var(--soft); font-size: .9rem; max-width: 60rem; }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; max-width: 56rem; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .35rem; max-width: 56rem; }
@media print {
  :root { --text: #000; --soft: #333; --paper: #fff; --line: #999; --band: #fff; --link: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .table { overflow: visible; }
  table { font-size: 7.5pt; }
  h2, caption { break-after: avoid; }
  tr, figure { break-inside: avoid; }
}
"""


def render_page(results: Mapping[str, Any], plots: Sequence[Plot]) -> str:
    """Return the report of a results document as one HTML page that contains its plots.

    All text of the document is escaped, and the page forbids scripts and external resources.

    Args:
        results: the document.
        plots: plots drawn of it; their SVG files are read.
    """
    report = build_report(results, plots)
    anchors = _anchors(report)
    named = list(zip(anchors, report.sections, strict=True))
    return _PAGE.format(
        title=escape_page(report.title),
        style=_STYLE,
        contents="\n".join(
            f'<li><a href="#{anchor}">{escape_page(section.title)}</a></li>' for anchor, section in named
        ),
        sections="\n".join(_section(section, anchor) for anchor, section in named),
    )


def _anchors(report: Report) -> list[str]:
    """Return the sections' names in links; a repeated name gets a number."""
    anchors: list[str] = []
    for section in report.sections:
        anchors.append(f"{section.anchor}-{len(anchors)}" if section.anchor in anchors else section.anchor)
    return anchors


def _section(section: Section, anchor: str) -> str:
    parts = "\n".join(_part(part) for part in section.parts)
    heading = f'<h2 id="{anchor}">{escape_page(section.title)}</h2>'
    return f'<section aria-labelledby="{anchor}">\n{heading}\n{parts}\n</section>'


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escape_page(part)}</p>"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Code):
        return f"<pre><code>{escape_page(part.text)}</code></pre>"
    if isinstance(part, Bullets):
        return "<ul>\n" + "\n".join(f"<li>{escape_page(item)}</li>" for item in part.items) + "\n</ul>"
    return _figure(part)


def _table(table: Table) -> str:
    heads = [_cell("th", text, table, place, scope="col") for place, text in enumerate(table.columns)]
    rows = ["".join(_body_cell(text, table, place) for place, text in enumerate(row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    notes = "".join(f'\n<p class="note">{escape_page(note)}</p>' for note in table.notes)
    # A wide table scrolls by itself, including by keyboard.
    return (
        f'<div class="table" role="region" aria-label="{escape_page(table.caption)}" tabindex="0">\n<table>\n'
        f"<caption>{escape_page(table.caption)}</caption>\n<thead><tr>{''.join(heads)}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>{notes}"
    )


def _body_cell(text: str, table: Table, place: int) -> str:
    return _cell("td", text, table, place) if place else _cell("th", text, table, place, scope="row")


def _cell(tag: str, text: str, table: Table, place: int, *, scope: str | None = None) -> str:
    scopes = f' scope="{scope}"' if scope else ""
    words = ' class="words"' if place < table.num_text_columns else ""
    return f"<{tag}{scopes}{words}>{escape_page(text)}</{tag}>"


def _figure(plot: Plot) -> str:
    """Return a plot as an image, not inline SVG, whose ids could clash with another plot's."""
    data = base64.b64encode(plot.svg.read_bytes()).decode("ascii")
    return (
        f'<figure>\n<img alt="{escape_page(plot.caption)}" src="data:image/svg+xml;base64,{data}">\n'
        f"<figcaption><strong>{escape_page(plot.title)}.</strong> {escape_page(plot.caption)}</figcaption>\n</figure>"
    )


MARKDOWN = "results.md"
PAGE = "results.html"
PLOTS = "plots"


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.md``, ``results.html`` and ``plots/`` to a folder, each atomically; old ones are replaced.

    Args:
        results: the results document.
        folder: where they go; created if missing.

    Raises:
        ImportError: matplotlib is not installed; then nothing is written.
    """
    plots = draw_plots(results, folder / PLOTS)
    write_text(folder / MARKDOWN, render_markdown(results, plots))
    write_text(folder / PAGE, render_page(results, plots))
