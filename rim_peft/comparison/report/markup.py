"""Write a report as GitHub's Markdown, and as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rim_peft.comparison.document import FORMAT, RESULTS
from rim_peft.comparison.plots import draw_plots
from rim_peft.comparison.plots.style import Plot
from rim_peft.comparison.questions import PAGE as QUESTIONS
from rim_peft.comparison.report.assembly import build_report
from rim_peft.comparison.report.content import Bullets, Code, Link, Part, Report, Section, Table
from rim_peft.comparison.report.style import SCRIPT, STYLE
from rim_peft.escaping import fence
from rim_peft.escaping import markdown as escape_markdown
from rim_peft.escaping import page as escape_page
from rim_peft.html_page import render_html
from rim_peft.training.files import write_text
from rim_peft.tuner.files import read_object
from rim_peft.values import shown


def render_markdown(
    results: Mapping[str, Any], plots: Sequence[Plot] | None = None, *, questions: str | None = None
) -> str:
    """Return the report of a results document as Markdown.

    Args:
        results: the document.
        plots: plots drawn of it, shown from their folder beside the file; None for a report without pictures.
        questions: the page of some of the test questions, as a path from the report; None if there is none.
    """
    report = build_report(results, plots, questions=questions)
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
    if isinstance(part, Link):
        return f"[{escape_markdown(part.text)}]({quote(part.target)})."
    if isinstance(part, Bullets):
        return "\n".join(f"* {escape_markdown(item)}" for item in part.items)
    return f"![{escape_markdown(part.caption)}]({part.folder.name}/{part.svg.name})\n\n{escape_markdown(part.caption)}"


def _write_table(table: Table) -> str:
    marks = ["---" if place < table.num_text_columns else "---:" for place in range(len(table.columns))]
    lines = [_row(table.columns), f"|{'|'.join(marks)}|", *(_row(row) for row in table.rows)]
    return "\n\n".join(
        [f"**{escape_markdown(table.caption)}**", "\n".join(lines), *(escape_markdown(note) for note in table.notes)]
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape_markdown(cell) for cell in cells)} |"


_BODY = """<header>
<h1>{title}</h1>
<p class="facts">{facts}</p>
</header>
<main>
{result}
<nav aria-label="Contents"><ol>
{contents}
</ol></nav>
{sections}
</main>"""


def render_page(results: Mapping[str, Any], plots: Sequence[Plot], *, questions: str | None = None) -> str:
    """Return the report of a results document as one HTML page that contains its plots.

    All text of the document is escaped. The page forbids external resources, and scripts but the one that sorts tables.

    Args:
        results: the document.
        plots: plots drawn of it; their SVG files are read.
        questions: the page of some of the test questions, as a path from the report; None if there is none.
    """
    report = build_report(results, plots, questions=questions)
    named = list(zip(_anchors(report), report.sections, strict=True))
    result, *sections = (_section(section, anchor) for anchor, section in named)
    links = (f'<li><a href="#{anchor}">{escape_page(section.title)}</a></li>' for anchor, section in named[1:])
    body = _BODY.format(
        title=escape_page(report.title),
        facts=escape_page(report.facts),
        result=result,
        contents="\n".join(links),
        sections="\n".join(sections),
    )
    return render_html(report.title, body, style=STYLE, script=SCRIPT, images=True)


def _anchors(report: Report) -> list[str]:
    """Return the sections' names in links; a repeated name gets a number."""
    anchors: list[str] = []
    for section in report.sections:
        anchors.append(f"{section.anchor}-{len(anchors)}" if section.anchor in anchors else section.anchor)
    return anchors


def _section(section: Section, anchor: str) -> str:
    heading = f'<h2 id="{anchor}">{escape_page(section.title)}</h2>'
    parts: list[str] = []
    plots: list[Plot] = []
    for part in reversed(section.parts):  # plots belong to the table before them
        if isinstance(part, Plot):
            plots.insert(0, part)
        elif isinstance(part, Table):
            parts.insert(0, _table(part, plots))
            plots = []
        else:
            parts.insert(0, _part(part))
    return f'<section aria-labelledby="{anchor}">\n{heading}\n{chr(10).join(parts)}\n</section>'


def _part(part: str | Code | Bullets | Link) -> str:
    if isinstance(part, str):
        return f"<p>{escape_page(part)}</p>"
    if isinstance(part, Code):
        return f'<pre tabindex="0"><code>{escape_page(part.text)}</code></pre>'
    if isinstance(part, Link):
        return f'<p class="link"><a href="{quote(part.target)}">{escape_page(part.text)}</a>.</p>'
    return "<ul>\n" + "\n".join(f"<li>{escape_page(item)}</li>" for item in part.items) + "\n</ul>"


def _table(table: Table, plots: Sequence[Plot]) -> str:
    """Return a table with its plots before it: side by side where there is room."""
    heads = [_cell("th", text, table, place, scope="col") for place, text in enumerate(table.columns)]
    rows = ["".join(_body_cell(text, table, place) for place, text in enumerate(row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    notes = "".join(f'\n<p class="note">{escape_page(note)}</p>' for note in table.notes)
    sorts = ' class="sorts"' if len(rows) > 2 and table.num_text_columns < len(table.columns) else ""
    # A wide table scrolls by itself, including by keyboard.
    box = (
        f'<div class="box" role="region" aria-label="{escape_page(table.caption)}" tabindex="0">\n<table{sorts}>\n'
        f"<caption>{escape_page(table.caption)}</caption>\n<thead><tr>{''.join(heads)}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )
    shown = f'<div class="pair">\n{chr(10).join(map(_figure, plots))}\n{box}\n</div>' if plots else box
    return f"{shown}{notes}"


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
        f'<figure>\n<div class="plot" role="group" aria-label="{escape_page(plot.title)}" tabindex="0">'
        f'<img alt="{escape_page(plot.caption)}" src="data:image/svg+xml;base64,{data}"></div>\n'
        f"<figcaption><strong>{escape_page(plot.title)}.</strong> {escape_page(plot.caption)}</figcaption>\n</figure>"
    )


MARKDOWN = "results.md"
PAGE = "results.html"
PLOTS = "plots"


def write_report(results: Mapping[str, Any], folder: Path, *, questions: Path | None = None) -> None:
    """Write ``results.md``, ``results.html`` and ``plots/`` to a folder, each atomically; old ones are replaced.

    Args:
        results: the results document.
        folder: where they go; created if missing.
        questions: page of some of the test questions, somewhere below the folder; None if there is none.

    Raises:
        ImportError: matplotlib is not installed; then nothing is written.
    """
    plots = draw_plots(results, folder / PLOTS)
    link = None if questions is None else questions.relative_to(folder).as_posix()
    write_text(folder / MARKDOWN, render_markdown(results, plots, questions=link))
    write_text(folder / PAGE, render_page(results, plots, questions=link))


def rewrite_report(folder: Path) -> dict[str, Any]:
    """Write a folder's report again from its ``results.json`` alone; its runs need not be there.

    Returns:
        The results document.

    Raises:
        ImportError: matplotlib is not installed; then nothing is written.
        OSError: the folder has no ``results.json``.
        ValueError: that file is not a comparison's, or of another format.
    """
    remedy = "Put back a copy, or run the comparison's recipe again."
    file = folder / RESULTS
    results = read_object(file, keys=["format"], remedy=remedy)
    if results["format"] != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT}, got {shown(results['format'])}. {remedy}")
    try:
        build_report(results)  # before anything is replaced
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{file}: must be what rim-peft compare wrote, but lacks {shown(error)}. {remedy}") from error
    # Only the reference's run has such a page.
    write_report(results, folder, questions=next(iter(sorted((folder / "runs").rglob(QUESTIONS))), None))
    return results
