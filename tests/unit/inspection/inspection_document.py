"""Inspections made by hand, for renderers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rim_peft.inspection.attention import group_layers
from rim_peft.inspection.document import (
    END,
    Alternative,
    BlockAttention,
    BlockReadout,
    Candidate,
    Chain,
    Inspection,
    LayerReading,
    QuestionInspection,
    Selection,
    Word,
)

EVIL = "<script>alert(1)</script>\"'><img src=//evil.test/x onerror=alert(1)>\u202egnp\x1b[31m\u2066 \ud83d" + "w" * 300
"""Markup, quotes, a change of direction, an escape, a lone surrogate and a very long word."""

NUM_LAYERS = 6
COLOURS = {"red": 1, "green": 2, "blue": 3, "plum": 4}


def candidates(text: str, probability: float = 0.8) -> tuple[Candidate, ...]:
    """A token, and the likeliest others."""
    others = [colour for colour in COLOURS if colour != text][:2]
    rest = [Candidate(COLOURS[colour], f" {colour}", (1 - probability) / 3) for colour in others]
    return (Candidate(COLOURS.get(text, 9), f" {text}", probability), *rest)


def readout(block: int, text: str, final: str, probability: float = 0.8) -> BlockReadout:
    end = (Candidate(0, "<eos>", 1.0), *candidates("red", 0.0)[:2])
    tokens = (candidates(text, probability), end)
    return BlockReadout(1, block, text, text, probability, True, text == final, tokens)


def question(*texts: str, asked: Any = "Tom boils Kim's brew. What colour?", **changes: Any) -> QuestionInspection:
    """A question whose blocks hold some texts."""
    words = (Word("<bos>", 1, True), *(Word(f" {word}", 1, False) for word in ("Tom", "boils", "Kim's", "brew")))
    final = texts[-1]
    readouts = tuple(readout(block, text, final) for block, text in enumerate(texts, start=1))
    agree = [text == final for text in texts]
    blocks = range(1, len(texts) + 1)
    places = [END, "memory 1", "memory 2"]
    return replace(
        QuestionInspection(
            question=asked,
            num_tokens=5,
            words=words,
            readouts=readouts,
            first_block=agree.index(True) + 1,
            settled_block=max((b for b, same in zip(blocks, agree, strict=True) if not same), default=0) + 1,
            lens=tuple(
                LayerReading(1, block, place, layer, candidates(texts[block - 1] if layer > 3 else "plum"), 0.1)
                for place in places
                for block in blocks
                for layer in range(1, NUM_LAYERS + 1)
            ),
            attention=tuple(
                BlockAttention(1, block, group.name, (0.3, 0.1, 0.05, 0.15, 0.2), 0.1, 0.05, 0.05)
                for group in group_layers(1, NUM_LAYERS)
                for block in blocks
            ),
            alternatives=(
                Alternative("removed", "no blocks", None, None, "red", "red", 0.6, True, False),
                Alternative("shuffled", "shuffled", None, None, final, final, 0.5, True, True),
                Alternative("swapped", "of another", "another question", "plum", "plum", "plum", 0.7, True, False),
            ),
            chain=Chain("How?", f"one\ntwo\n#### {final}", final, 12, True, True, 2400.0, 80.0, 2),
            selection=(Selection("final", len(texts), None), Selection("vote", len(texts), None)),
            missing={},
        ),
        **changes,
    )


def inspection(*questions: QuestionInspection, **changes: Any) -> Inspection:
    found = Inspection(
        adapter="outputs/demo",
        base="tiny",
        method="rim",
        num_loops=1,
        num_blocks=len(questions[0].readouts),
        block_size=2,
        num_layers=NUM_LAYERS,
        first_layer=1,
        layer_groups=group_layers(1, NUM_LAYERS),
        seed=0,
        questions=questions,
    )
    return replace(found, **changes)


def evil_inspection() -> Inspection:
    """Every text is hostile."""
    candidate = Candidate(7, EVIL, 0.5)
    bad = BlockReadout(1, 1, EVIL, EVIL, 0.5, False, True, ((candidate, candidate), (candidate, candidate)))
    found = question("red", asked=[{"role": "user", "content": EVIL}])
    found = replace(
        found,
        words=(Word(EVIL, 1, True), *(Word(f" {EVIL}", 1, False) for _ in range(4))),
        readouts=(bad,),
        lens=tuple(replace(reading, candidates=(candidate, candidate)) for reading in found.lens or ()),
        alternatives=tuple(
            replace(other, donor=EVIL, donor_answer=EVIL, text=EVIL, answer=EVIL) for other in found.alternatives
        )[1:],
        chain=replace(found.chain, prompt=EVIL, text=EVIL, answer=EVIL),  # type: ignore[type-var]
        missing={"removed": EVIL},
    )
    lacking = replace(
        found, lens=None, attention=None, chain=None, missing=dict.fromkeys(("lens", "attention", "chain"), EVIL)
    )
    return inspection(found, lacking, adapter=EVIL, base=EVIL, method=EVIL)
