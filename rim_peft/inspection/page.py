"""An inspection as one HTML page: without scripts, and with nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rim_peft.escaping import page as escape
from rim_peft.html_page import render_html
from rim_peft.inspection.document import FORMAT, BlockReadout, Chain, Inspection, QuestionInspection
from rim_peft.inspection.evidence import alternatives_table, attention_part, map_part, tokens_part
from rim_peft.inspection.signals import arrival, headline, percent, quoted, read_signals, tally
from rim_peft.inspection.style import page_style
from rim_peft.values import cut
from rim_peft.version import __version__

_BODY = """<header>
<h1>{title}</h1>
<p class="facts">{facts}</p>
{contents}
</header>
<main>
{questions}
</main>
<footer>
<p class="note">{notes}</p>
</footer>"""

_NOTES = (
    "A readout is what the model would answer if it stopped after that block. Probabilities are the model's own, of "
    "the whole readout with its end. A map's cell is what the output head reads in a layer's state, which the layers "
    "above may still change; attention shows where a block looks, not what it takes from there. "
)

_LONG, _LINE = 18, 100
_MARKS = {True: ("for", "supports"), False: ("against", "against"), None: ("neither", "neither")}


def render_page(inspection: Inspection, *, remarks: Sequence[str] = ()) -> str:
    """Return an inspection as one HTML page.

    All text of models and questions is escaped. The page has no script; its content-security policy allows nothing but
    its own style sheet, by its hash.

    Args:
        inspection: the document.
        remarks: a sentence about each question, such as whether its answer is right; empty for none.
    """
    num_choices = max(len(inspection.layer_groups), inspection.block_size + 1)
    told = remarks or [""] * len(inspection.questions)
    shown = list(zip(inspection.questions, told, strict=True))
    body = _BODY.format(
        title=escape(title(inspection)),
        facts=escape(describe(inspection)),
        contents=_contents(shown) if len(shown) > 1 else "",
        questions="\n".join(
            _question(inspection, number, question, remark) for number, (question, remark) in enumerate(shown, start=1)
        ),
        notes=escape(f"{_NOTES}Document format {FORMAT}, rim-peft {__version__}."),
    )
    return render_html(
        title(inspection), body, style=page_style(num_blocks=inspection.num_blocks, num_choices=num_choices)
    )


def title(inspection: Inspection) -> str:
    """Return what an inspection shows, as a heading."""
    return f"How {inspection.adapter or 'an adapter'} thinks"


def describe(inspection: Inspection) -> str:
    """Return blocks, base and layers in one line."""
    blocks = "1 block" if inspection.num_blocks == 1 else f"{inspection.num_blocks} blocks"
    memory = "1 memory token" if inspection.block_size == 1 else f"{inspection.block_size} memory tokens"
    method = "" if inspection.method in (None, "rim") else f", method {inspection.method}"
    return f"{blocks} of {memory} on {inspection.base}, {inspection.num_layers} layers{method}"


def _contents(shown: Sequence[tuple[QuestionInspection, str]]) -> str:
    items = [
        f'<li><a href="#q{number}"><bdi>{escape(cut(question_text(question), most=_LINE))}</bdi></a>: '
        f"<bdi>{escape(quoted(question.final.answer))}</bdi>, {percent(question.final.probability)}. "
        f"<bdi>{escape(remark)}</bdi></li>"
        for number, (question, remark) in enumerate(shown, start=1)
    ]
    return f'<nav aria-label="Questions"><ol>\n{chr(10).join(items)}\n</ol></nav>'


def question_text(question: QuestionInspection) -> str:
    """Return the question as a person asked it: of a chat, the last message."""
    asked = question.question
    return asked if isinstance(asked, str) else asked[-1]["content"]


def _question(inspection: Inspection, number: int, question: QuestionInspection, remark: str) -> str:
    parts = [
        f'<h2 id="q{number}" dir="auto">{escape(question_text(question))}</h2>',
        _result(question),
        *([f'<p class="remark"><bdi>{escape(remark)}</bdi></p>'] if remark else []),
        _film(question),
        "<h3>Whether to believe it</h3>",
        _signals(question),
        "<h3>Where in the layers it came about</h3>",
        map_part(inspection, question, number),
        "<h3>What each block looks at</h3>",
        attention_part(inspection, question, number),
        "<h3>What if the blocks were others</h3>",
        alternatives_table(question),
        *_written(question),
        "<h3>Every token</h3>",
        tokens_part(question),
    ]
    return f'<article class="question" aria-labelledby="q{number}">\n{chr(10).join(parts)}\n</article>'


def _result(question: QuestionInspection) -> str:
    final = question.final
    answer = final.answer or final.text or "(nothing)"
    return (
        '<p class="result"><span class="label">Answer</span> '
        f'<bdi class="{_sized("big", answer)}">{escape(answer)}</bdi> '
        f'<span class="chance">{percent(final.probability)}</span> '
        f"<span>{escape(headline(question))} {escape(tally(read_signals(question)))}</span></p>"
    )


def _sized(name: str, text: str) -> str:
    return f"{name} long" if len(text) > _LONG else name


def _film(question: QuestionInspection) -> str:
    cards = "\n".join(_card(readout, question) for readout in question.readouts)
    return f'<ol class="film" aria-label="What it held after each block">\n{cards}\n</ol>'


def _card(readout: BlockReadout, question: QuestionInspection) -> str:
    held = readout.text or "(nothing)"
    note = arrival(question, readout.block)
    tag = f'<span class="tag">{note}</span>' if note else ""
    is_kept = question.settled_block is not None and readout.block >= question.settled_block
    kind = "agrees kept" if is_kept else "agrees" if readout.agrees else "differs"
    return (
        f'<li class="{kind}"><span class="label">after block {readout.block}</span>'
        f'<bdi class="{_sized("held", held)}">{escape(held)}</bdi>{_bar(readout.probability)}'
        f"<span>{percent(readout.probability)}</span>{tag}</li>"
    )


def _bar(share: float) -> str:
    return (
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="4"/><rect class="fill" width="{100 * share:.1f}" height="4"/></svg>'
    )


def _signals(question: QuestionInspection) -> str:
    items = []
    for signal in read_signals(question):
        kind, word = _MARKS[signal.supports]
        items.append(f'<li class="{kind}"><span class="mark">{word}</span><span>{escape(signal.text)}</span></li>')
    return f'<ul class="signals">\n{chr(10).join(items)}\n</ul>'


def _written(question: QuestionInspection) -> Iterable[str]:
    chain = question.chain
    if chain is not None:
        yield "<h3>What the base writes instead</h3>"
        yield _chain(question, chain)
    elif "chain" in question.missing:
        yield "<h3>What the base writes instead</h3>"
        yield f'<p class="note">Not shown: {escape(question.missing["chain"])}</p>'


def _chain(question: QuestionInspection, chain: Chain) -> str:
    end = "" if chain.is_complete else " It was cut at the limit of tokens."
    same = "the same answer" if chain.agrees else quoted(chain.answer)
    return (
        '<div class="written">\n'
        f'<div><span class="label">in memory blocks</span><span class="time">{_time(chain.adapter_ms)}</span>'
        f"<p>{chain.adapter_tokens} tokens: <bdi>{escape(quoted(question.final.answer))}</bdi></p></div>\n"
        f'<div><span class="label">the base alone, in writing</span><span class="time">{_time(chain.ms)}</span>'
        f"<p>{chain.num_tokens} tokens: <bdi>{escape(same)}</bdi>.{end}</p></div>\n</div>\n"
        f'<pre dir="auto" tabindex="0" aria-label="The base\'s text">{escape(chain.text) or "(nothing)"}</pre>\n'
        f'<details><summary>How it was asked</summary><pre dir="auto">{escape(chain.prompt)}</pre></details>'
    )


def _time(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"
