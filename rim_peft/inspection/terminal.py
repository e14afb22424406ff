"""An inspection in short, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rim_peft.escaping import one_line
from rim_peft.inspection.document import Inspection, QuestionInspection
from rim_peft.inspection.signals import arrival, headline, percent, quoted, read_signals, tally
from rim_peft.values import cut

_MARKS = {True: "+", False: "-", None: "."}
_WIDTH = 40


def render_text(inspection: Inspection) -> str:
    """Return each question, the readout after each block, and the signs for (+) and against (-) the answer."""
    return "\n\n".join("\n".join(_lines(question)) for question in inspection.questions)


def _lines(question: QuestionInspection) -> Iterator[str]:
    yield one_line(cut(question.prompt, most=300))
    yield ""
    for readout in question.readouts:
        text = one_line(cut(readout.text, most=_WIDTH)) or "(nothing)"
        note = arrival(question, readout.block)
        arrow = f"  <- {note}" if note else ""
        yield f"  block {readout.block:<3} {text:{_WIDTH}} {percent(readout.probability):>6}{arrow}"
    yield ""
    signals = read_signals(question)
    yield one_line(f"answer {quoted(question.final.answer)}. {headline(question)} {tally(signals)}")
    for signal in signals:
        yield one_line(f"  {_MARKS[signal.supports]} {signal.text}")
    for name, reason in question.missing.items():
        yield one_line(f"  not shown: {name} ({reason})")
    if question.chain is not None:
        chain = question.chain
        yield (
            f"time: {chain.adapter_ms:.0f} ms for {chain.adapter_tokens} tokens after the blocks, "
            f"{chain.ms:.0f} ms for {chain.num_tokens} tokens written by the base"
        )
