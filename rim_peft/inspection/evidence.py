"""The parts of an inspection's page below its picture: map, attention, alternatives, tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rim_peft.escaping import page as escape
from rim_peft.inspection.document import (
    END,
    BlockAttention,
    Candidate,
    Inspection,
    LayerReading,
    QuestionInspection,
    Word,
)
from rim_peft.inspection.signals import percent
from rim_peft.inspection.style import LEVELS

_SIGNS = str.maketrans({" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"})
_MOST_WORDS = 5


def _shown(token: str) -> str:
    """Return a token with its white space made visible.

    >>> _shown(" red"), _shown("a\\n"), _shown("")
    ('·red', 'a⏎', '∅')
    """
    return token.translate(_SIGNS) or "∅"


def _level(share: float) -> int:
    """Return the step of a colour for a share of at most 1."""
    return min(LEVELS, max(0, round(LEVELS * share)))


def _missing(question: QuestionInspection, name: str) -> str:
    return f'<p class="note">Not shown: {escape(question.missing.get(name, "no reason is known"))}</p>'


def _switch(name: str, legend: str, choices: Sequence[str], panels: Sequence[str]) -> str:
    """Return panels of which one is shown, chosen by radio buttons; a style sheet does it, without a script."""
    picks = "".join(
        f'<label><input type="radio" name="{name}" class="pick{index}"{"" if index else " checked"}>{choice}</label>'
        for index, choice in enumerate(choices)
    )
    shown = "\n".join(f'<div class="panel panel{index}">\n{panel}\n</div>' for index, panel in enumerate(panels))
    fieldset = f"<fieldset><legend>{legend}</legend>{picks}</fieldset>\n" if len(panels) > 1 else ""
    return f'<div class="switch">\n{fieldset}{shown}\n</div>' if fieldset else shown


def _table(kind: str, caption: str, columns: Sequence[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Return a table of escaped cells, each row a header and its other cells with their tags."""
    heads = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "\n".join(f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>' for head, cells in rows)
    # A wide table scrolls by itself, including by keyboard.
    return (
        f'<div class="box" role="group" tabindex="0" aria-label="{caption}"><table class="{kind}">\n'
        f"<caption>{caption}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def map_part(inspection: Inspection, question: QuestionInspection, number: int) -> str:
    """Return the map of layers and blocks, and a table of its next best tokens."""
    if question.lens is None:
        return _missing(question, "lens")
    places = list(dict.fromkeys(reading.place for reading in question.lens))
    names = ["each block's end" if place == END else f"its {place}" for place in places]
    names = [name.replace("memory ", "memory token ") for name in names]
    maps = [
        _map(question, place, f"Most likely token, layers by blocks, at {name}")
        for place, name in zip(places, names, strict=True)
    ]
    details = "\n".join(_layers_table(question, block) for block in range(1, inspection.num_blocks + 1))
    return (
        "<p>The token that the output head reads in each layer's state, with its probability in percent. The last "
        "layer is on top: at a block's end, that is where the readout begins.</p>\n"
        '<ul class="legend"><li><span class="chip answer s6">bold</span> begins the answer</li>'
        '<li><span class="chip own s6">dotted</span> begins the block\'s own readout</li>'
        '<li><span class="chip other s4">plain</span> another token</li></ul>\n'
        f"{_switch(f'place{number}', 'Read at', names, maps)}\n"
        f"<details><summary>All layers with the next best tokens</summary>\n{details}\n</details>"
    )


def _map(question: QuestionInspection, place: str, caption: str) -> str:
    blocks = [readout.block for readout in question.readouts]
    by_layer: dict[int, list[LayerReading]] = {}
    for reading in question.lens or ():
        if reading.place == place:
            by_layer.setdefault(reading.layer, []).append(reading)
    rows = [
        (f"{layer}", [_cell(question, reading) for reading in by_layer[layer]])
        for layer in sorted(by_layer, reverse=True)
    ]
    return _table("map", caption, ["layer", *(f"block {block}" for block in blocks)], rows)


def reading_kind(question: QuestionInspection, reading: LayerReading) -> str:
    """Return whether a layer's likeliest token begins the answer, the block's own readout, or neither (``"other"``)."""
    best = reading.candidates[0].token_id
    if best == question.final.tokens[0][0].token_id:
        return "answer"
    return "own" if best == question.readouts[reading.block - 1].tokens[0][0].token_id else "other"


def _cell(question: QuestionInspection, reading: LayerReading) -> str:
    best, kind = reading.candidates[0], reading_kind(question, reading)
    text = best.text.strip() or _shown(best.text)
    chance = f'<span class="n">{100 * best.probability:.0f}</span>'
    return f'<td class="{kind} s{_level(best.probability)}">{chance}<bdi>{escape(text)}</bdi></td>'


def _layers_table(question: QuestionInspection, block: int) -> str:
    found = [reading for reading in question.lens or () if reading.block == block and reading.place == END]
    best = range(1, len(found[0].candidates) + 1)
    rows = [
        (f"{reading.layer}", [*map(_candidate, reading.candidates), f"<td>{percent(reading.answer_probability)}</td>"])
        for reading in reversed(found)
    ]
    columns = ["layer", *(f"{rank}." for rank in best), "answer's first token"]
    return _table("numbers", f"Block {block}, at its end", columns, rows)


def _candidate(candidate: Candidate) -> str:
    return f"<td><code><bdi>{escape(_shown(candidate.text))}</bdi></code> {percent(candidate.probability)}</td>"


def attention_part(inspection: Inspection, question: QuestionInspection, number: int) -> str:
    """Return the prompt once for each block, shaded by attention, and a table of the words with most of it."""
    if question.attention is None:
        return _missing(question, "attention")
    groups = [group.name for group in inspection.layer_groups]
    names = [f"{group.name} ({group.first}–{group.last})" for group in inspection.layer_groups]
    panels = [
        '<dl class="looks">\n'
        + "\n".join(_look(question.words, row) for row in question.attention if row.layers == group)
        + "\n</dl>"
        for group in groups
    ]
    rows = [
        (f"block {row.block}", [f"<td>{_most(question.words, row)}</td>"])
        for row in question.attention
        if row.layers == groups[0]
    ]
    table = _table("words", "Words with most attention, means over all layers", ["block", "words"], rows)
    return (
        "<p>Attention weights, means over heads and over a block's tokens; the strongest colour is the most. The "
        "prompt's first word is left out of the scale, since models rest their attention on it.</p>\n"
        f"{_switch(f'layers{number}', 'Mean over', names, panels)}\n"
        f"<details><summary>The words in numbers</summary>\n{table}\n</details>"
    )


def _look(words: Sequence[Word], row: BlockAttention) -> str:
    rated = [
        share for index, (word, share) in enumerate(zip(words, row.words, strict=True)) if index and not word.is_special
    ]
    top = max(rated, default=0.0) or 1.0
    spans = "".join(_shaded(word, _level(share / top)) for word, share in zip(words, row.words, strict=True))
    parts = [
        ("the prompt", sum(row.words)),
        ("earlier blocks", row.earlier_blocks),
        ("the block itself", row.own_block),
    ]
    parts += [("no token", row.elsewhere)] if row.elsewhere > 0.0005 else []
    rest = ", ".join(f"{name} {percent(share)}" for name, share in parts)
    return f'<dt>block {row.block}</dt><dd><p class="prompt" dir="auto">{spans}</p>\n<p class="rest">{rest}</p></dd>'


def _shaded(word: Word, level: int) -> str:
    """Return a word on its colour; the white space before it has none."""
    bare = word.text.lstrip()
    space = word.text[: len(word.text) - len(bare)]
    return f'{escape(space)}<span class="{"special" if word.is_special else "answer"} s{level}">{escape(bare)}</span>'


def _most(words: Sequence[Word], row: BlockAttention) -> str:
    order = sorted(range(len(words)), key=lambda index: -row.words[index])[:_MOST_WORDS]
    return ", ".join(
        f"<bdi>{escape(words[index].text.strip() or _shown(words[index].text))}</bdi> {percent(row.words[index])}"
        for index in order
    )


_CHANGES = {"removed": "no blocks", "shuffled": "shuffled blocks", "swapped": "another question's blocks"}


def alternatives_table(question: QuestionInspection) -> str:
    """Return the answers with changed blocks, side by side."""
    final = question.final
    rows = [("its own blocks", [_answer(final.text), f"<td>{percent(final.probability)}</td>", "<td>as it is</td>"])]
    found = {alternative.name: alternative for alternative in question.alternatives}
    for name, label in _CHANGES.items():
        if (alternative := found.get(name)) is None:
            reason = escape(question.missing.get(name, "no reason is known"))
            rows.append((label, [f'<td colspan="3"><span class="note">Not shown: {reason}</span></td>']))
            continue
        same = "the same answer" if alternative.agrees else "another answer"
        if alternative.donor is not None:
            donor = alternative.donor if isinstance(alternative.donor, str) else alternative.donor[-1]["content"]
            lent = (
                f"whose answer is “{alternative.donor_answer}”" if alternative.donor_answer else "which gets no answer"
            )
            same = f"{same}; the blocks are of “{donor}”, {lent}"
        rows.append(
            (
                label,
                [_answer(alternative.text), f"<td>{percent(alternative.probability)}</td>", f"<td>{escape(same)}</td>"],
            )
        )
    return _table("numbers", "Answers with changed blocks", ["blocks", "answer", "probability", "compared"], rows)


def _answer(text: str) -> str:
    return f"<td><bdi>{escape(text or '(nothing)')}</bdi></td>"


def tokens_part(question: QuestionInspection) -> str:
    """Return each readout's tokens with their next best ones."""
    return "\n".join(
        f"<details><summary>Block {readout.block}: <bdi>{escape(readout.text or '(nothing)')}</bdi></summary>\n"
        + _table(
            "numbers",
            f"Tokens of block {readout.block}'s readout",
            ["token", "probability", *(f"next best {rank}" for rank in range(1, len(readout.tokens[0])))],
            [
                (
                    f"<code><bdi>{escape(_shown(chosen.text))}</bdi></code>",
                    [f"<td>{percent(chosen.probability)}</td>", *map(_candidate, others)],
                )
                for chosen, *others in readout.tokens
            ],
        )
        + "\n</details>"
        for readout in question.readouts
    )
