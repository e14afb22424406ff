"""Signs for and against an answer, in words, from an inspection's document; and all of it in short, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rim_peft.escaping import one_line
from rim_peft.inspection.document import Alternative, Inspection, QuestionInspection
from rim_peft.values import cut

SURE, UNSURE = 0.9, 0.5
"""From this probability on a sign supports the answer; below the other one it speaks against it."""

_LONGEST = 60

_MARKS = {True: "+", False: "-", None: "."}
_WIDTH = 40


@dataclass(frozen=True)
class Signal:
    """A sign; ``supports`` is None if it says nothing either way."""

    supports: bool | None
    text: str


def percent(probability: float) -> str:
    """Return a probability as text.

    >>> percent(0.987), percent(0.0123), percent(0.00001), percent(0.9999)
    ('99 %', '1.2 %', '0.0 %', '100 %')
    """
    return f"{100 * probability:.{0 if probability >= 0.1 else 1}f} %"


def quoted(text: str | None) -> str:
    """Return an answer in quotation marks, cut to a line."""
    return f"“{cut(text, most=_LONGEST)}”" if text else "no answer that can be read"


def headline(question: QuestionInspection) -> str:
    """Return when the answer came, in a sentence."""
    last = len(question.readouts)
    if question.settled_block is None:
        return "The last block's readout holds no answer that can be read."
    if question.settled_block == 1:
        return "Held from the first block on."
    if question.settled_block == last:
        return f"Held only after the last block, {last}."
    return f"Held from block {question.settled_block} on."


def arrival(question: QuestionInspection, block: int) -> str | None:
    """Return what a block means for the coming of the answer, in a few words; None if it means nothing."""
    if block == question.settled_block:
        return "the answer" if block == len(question.readouts) else "the answer, from here on"
    return "the same, but not kept" if block == question.first_block else None


def read_signals(question: QuestionInspection) -> list[Signal]:
    """Return all signs, those about the answer itself first; without an answer nothing supports it."""
    found = [
        *_of_answer(question),
        *_of_selection(question),
        *(_of_alternative(question, alternative) for alternative in question.alternatives),
        *_of_chain(question),
    ]
    return found if question.settled_block is not None else [Signal(s.supports and None, s.text) for s in found]


def tally(signals: Sequence[Signal]) -> str:
    """Return how many signs speak for and against an answer.

    >>> tally([Signal(True, ""), Signal(None, ""), Signal(False, "")])
    'Of 3 signs 1 supports it, 1 speaks against it.'
    """
    found = [signal.supports for signal in signals]
    supporting, against = found.count(True), found.count(False)
    return (
        f"Of {len(found)} signs {supporting} {'supports' if supporting == 1 else 'support'} it, "
        f"{against or 'none'} {'speak' if against > 1 else 'speaks'} against it."
    )


def _of_answer(question: QuestionInspection) -> Iterator[Signal]:
    final, last, settled = question.final, len(question.readouts), question.settled_block
    if settled is None:
        yield Signal(False, "The last readout holds no answer that can be read.")
        return
    chance = final.probability
    supports = True if chance >= SURE else False if chance < UNSURE else None
    yield Signal(supports, f"Its probability is {percent(chance)}.")
    if not final.is_complete:
        yield Signal(False, "It did not end within the limit of tokens.")
    if question.first_block is not None and question.first_block < settled:
        first = question.first_block
        yield Signal(
            None, f"Block {first} held it too, but not the blocks up to {settled}: a step, or a guess given up."
        )
    elif settled < last:
        yield Signal(True, f"It stays the same from block {settled} to block {last}.")
    elif last > 1:
        yield Signal(None, f"Only the last block, {last}, gives it.")


def _of_selection(question: QuestionInspection) -> Iterator[Signal]:
    for selection in question.selection:
        chosen = question.readouts[selection.block - 1]
        if selection.rule == "probe" and selection.scores is not None:
            chance = 1 / (1 + math.exp(-max(-50.0, selection.scores[-1])))
            supports = True if chance >= SURE else False if chance < UNSURE else None
            yield Signal(supports, f"The probe takes it to be right with {percent(chance)}.")
        if selection.rule != "final" and not chosen.agrees:
            rule = {"vote": "A vote of the blocks", "confidence": "The most confident block"}.get(
                selection.rule, "The probe"
            )
            yield Signal(None, f"{rule} would choose block {selection.block}: {quoted(chosen.answer)}.")


def _of_alternative(question: QuestionInspection, found: Alternative) -> Signal:
    said = f"{quoted(found.answer)} ({percent(found.probability)})"
    if found.name == "swapped":
        if found.donor_answer == question.final.answer:
            return Signal(None, "The question that lends its blocks has the same answer, so they show nothing.")
        if found.answer is not None and found.answer == found.donor_answer:
            return Signal(True, f"With another question's blocks it gives that question's answer, {said}.")
        kept = "still its own answer, " if found.agrees else "a third answer, " if found.answer else ""
        return Signal(None, f"With another question's blocks it gives {kept}{said}.")
    changed = {"removed": "Without its blocks", "shuffled": "With its blocks' tokens shuffled"}[found.name]
    if found.agrees:
        return Signal(None, f"{changed} it gives the same answer, {said}.")
    return Signal(True, f"{changed} it gives {said}: the blocks decide.")


def _of_chain(question: QuestionInspection) -> Iterator[Signal]:
    chain = question.chain
    if chain is not None:
        told = "ends in the same answer" if chain.agrees else f"ends in {quoted(chain.answer)}"
        yield Signal(True if chain.agrees else None, f"The base, writing {chain.num_tokens} tokens, {told}.")


def render_text(inspection: Inspection) -> str:
    """Return each question, the readout after each block, and the signs for (+) and against (-) the answer."""
    return "\n\n".join("\n".join(_text_lines(question)) for question in inspection.questions)


def _text_lines(question: QuestionInspection) -> Iterator[str]:
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
