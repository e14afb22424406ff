"""One question of an inspection as a picture: an SVG file for a README, a paper or a slide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from rim_peft.escaping import one_line
from rim_peft.escaping import page as escape
from rim_peft.inspection.document import END, BlockReadout, Inspection, LayerReading, QuestionInspection
from rim_peft.inspection.evidence import reading_kind
from rim_peft.inspection.page import describe, question_text, title
from rim_peft.inspection.signals import headline, percent, quoted, read_signals, tally
from rim_peft.values import cut

_MARGIN, _GUTTER = 36, 56
"""Units around everything, and left of the first block, where layers are numbered."""
_COLUMN, _LEAST_WIDTH = 110, 960
_ROW, _MOST_HEIGHT = 14, 460
"""Units of a layer's row, as far as all of them fit."""
_MOST_LINES = 5

_LOOK = """
svg { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1c1a; --soft: #5c5954; --line: #dedad2; --answer: #0f766e;
  --own: #b45309; --other: #78716c; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #151413; --ink: #eeebe6; --soft: #b0aaa1; --line: #3a3733; --answer: #2dd4bf; --own: #fbbf24;
    --other: #a8a29e; }
}
text { font: 15px system-ui, sans-serif; font-variant-numeric: tabular-nums; fill: var(--ink); unicode-bidi: isolate; }
.paper { fill: var(--paper); }
.soft { fill: var(--soft); font-size: 14px; }
.small { font-size: 11px; }
.name { fill: var(--soft); font: italic 15px ui-serif, Georgia, Cambria, "Times New Roman", serif; }
.asked { font: 22px ui-serif, Georgia, Cambria, "Times New Roman", serif; }
.held { font: 500 27px ui-serif, Georgia, Cambria, "Times New Roman", serif; }
.strong { font-weight: 600; }
.end { text-anchor: end; }
.line { stroke: var(--line); stroke-width: 2; }
.track { fill: var(--line); }
.dot { fill: var(--paper); stroke: var(--own); stroke-width: 2; }
.dot.answer { fill: var(--answer); stroke: var(--answer); }
.fill.own, .cell.own { fill: var(--own); }
.fill.answer, .cell.answer, text.answer { fill: var(--answer); }
.cell.other { fill: var(--other); }
text.against { fill: var(--own); }
"""

_Part = tuple[float, list[str]]
"""Height, and elements that begin at a height of 0."""


def render_picture(inspection: Inspection, question: QuestionInspection) -> str:
    """Return a question's picture: what each block held, in which layer that came about, and signs for and against it.

    Texts are escaped, and cut where there is no room; the file has no script and loads nothing.

    Args:
        inspection: the document.
        question: one of its questions.
    """
    width = max(_LEAST_WIDTH, 2 * _MARGIN + _GUTTER + _COLUMN * inspection.num_blocks)
    step = (width - 2 * _MARGIN - _GUTTER) / inspection.num_blocks
    parts = [
        _asked(inspection, question, width),
        _film(question, step),
        *([_layers(question, question.lens, step)] if question.lens else []),
        _signs(question, width),
    ]
    height, body = float(_MARGIN), []
    for taken, elements in parts:
        body.append(f'<g transform="translate({_MARGIN} {height:.0f})">\n{chr(10).join(elements)}\n</g>')
        height += taken
    height += _MARGIN / 2
    told = "; ".join(f"after block {readout.block}: {quoted(readout.text)}" for readout in question.readouts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="title told">\n'
        f'<title id="title">{escape(one_line(question_text(question)))}</title>\n'
        f'<desc id="told">{escape(told)}</desc>\n'
        f'<style>{_LOOK}</style>\n<rect class="paper" width="100%" height="100%" rx="8"/>\n'
        f"{chr(10).join(body)}\n</svg>\n"
    )


def _text(x: float, y: float, kind: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(one_line(text))}</text>'


def _asked(inspection: Inspection, question: QuestionInspection, width: float) -> _Part:
    line = round(width / 12.6)
    lines = textwrap.wrap(cut(question_text(question), most=line * _MOST_LINES), line)
    elements = [
        _text(0, 14, "name", cut(title(inspection), most=line)),
        _text(0, 36, "soft", cut(describe(inspection), most=line)),
        *(_text(0, 78 + 29 * place, "asked", text) for place, text in enumerate(lines)),
    ]
    return 78 + 29 * len(lines) + 8, elements


def _film(question: QuestionInspection, step: float) -> _Part:
    right = _GUTTER + step * len(question.readouts)
    elements = [f'<path class="line" d="M{_GUTTER} 8H{right:.1f}"/>']
    for readout in question.readouts:
        x = _GUTTER + step * (readout.block - 1)
        # An inner SVG clips: a long readout ends at its column.
        elements.append(f'<svg x="{x:.1f}" width="{step - 10:.1f}" height="120">')
        elements += [*_card(readout, step - 24), "</svg>"]
    return 134, elements


def _card(readout: BlockReadout, width: float) -> Iterator[str]:
    kind = "answer" if readout.agrees else "own"
    yield f'<circle class="dot {kind}" cx="8" cy="8" r="6.5"/>'
    yield _text(0, 37, "soft", f"after block {readout.block}")
    yield _text(0, 68, f"held {kind}", cut(readout.text, most=24) or "(nothing)")
    yield f'<rect class="track" y="82" width="{width:.1f}" height="4"/>'
    yield f'<rect class="fill {kind}" y="82" width="{width * readout.probability:.1f}" height="4"/>'
    yield _text(0, 107, "", percent(readout.probability))


def _layers(question: QuestionInspection, lens: Sequence[LayerReading], step: float) -> _Part:
    """Return a column of cells for each block, the last layer on top; a token is named where it comes up."""
    found = [reading for reading in lens if reading.place == END]
    numbers = sorted({reading.layer for reading in found}, reverse=True)
    row = min(_ROW, _MOST_HEIGHT / len(numbers))
    tops = {layer: 26 + place * row for place, layer in enumerate(numbers)}
    elements = [
        _text(_GUTTER, 12, "soft", "The token that the output head reads in each layer's state at the block's end")
    ]
    each = -(-len(numbers) // 6)
    elements += [
        _text(_GUTTER - 10, tops[layer] + row - 3, "soft small end", f"layer {layer}")
        for layer in numbers
        if layer % each == 0 or layer in (numbers[0], numbers[-1])
    ]
    for block, readings in groupby(found, key=lambda reading: reading.block):
        x = _GUTTER + step * (block - 1)
        elements.append(f'<svg x="{x:.1f}" width="{step - 8:.1f}" height="{26 + row * len(numbers) + 4:.1f}">')
        elements += [*_column(question, sorted(readings, key=lambda reading: reading.layer), tops, row), "</svg>"]
    return 26 + row * len(numbers) + 30, elements


def _column(
    question: QuestionInspection, readings: Sequence[LayerReading], tops: dict[int, float], row: float
) -> Iterator[str]:
    for reading in readings:
        share = 0.1 + 0.35 * reading.candidates[0].probability
        yield (
            f'<rect class="cell {reading_kind(question, reading)}" y="{tops[reading.layer]:.1f}" width="100%" '
            f'height="{max(row - 1.5, 1):.1f}" rx="2" fill-opacity="{share:.2f}"/>'
        )
    for _, same in groupby(readings, key=lambda reading: reading.candidates[0].token_id):
        run = list(same)
        if row * len(run) >= _ROW - 3:
            text = run[0].candidates[0].text.strip() or "(space)"
            yield _text(6, tops[run[0].layer] + min(row, _ROW) - 3.5, "small", cut(text, most=20))


def _signs(question: QuestionInspection, width: float) -> _Part:
    """Return the answer with the signs that say something for or against it."""
    final, signals, line = question.final, read_signals(question), round(width / 9)
    told = f"{headline(question)} {tally(signals)}"
    answer = quoted(final.answer and cut(final.answer, most=20))
    elements = [_text(0, 14, "strong", f"{answer}, {percent(final.probability)}. {told}")]
    for signal in (signal for signal in signals if signal.supports is not None):
        y = 14 + 25 * (len(elements) + 1) // 2
        kind, word = ("answer", "supports") if signal.supports else ("against", "against")
        elements += [_text(0, y, f"strong {kind}", word), _text(84, y, "", cut(signal.text, most=line))]
    return 14 + 25 * ((len(elements) + 1) // 2), elements
