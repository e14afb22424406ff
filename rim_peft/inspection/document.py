"""The document of an inspection: what a model held after each block, as data that every renderer shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rim_peft.data.examples import Question
from rim_peft.version import __version__

KIND, FORMAT = "rim-peft inspection", 1
"""Name and version of the document; the version changes when a field changes its meaning or is removed."""

END = "end"
"""The place of a block's last token, ``</b>``, whose state the head reads; the memory tokens are ``memory 1 …``."""


@dataclass(frozen=True)
class Candidate:
    """A token that may come next, and its probability."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class BlockReadout:
    """What a block holds: the text that follows directly after it.

    Attributes:
        loop: pass over the blocks, from 1; always 1 so far.
        block: number of the block, from 1.
        text: the readout, as ``read_blocks`` gives it.
        answer: the answer in it by the task's rule; None if there is none.
        probability: of the whole readout, EOS included.
        is_complete: whether it ended within the limit of tokens.
        agrees: whether its answer is the last block's.
        tokens: for each of its tokens the token itself, then the likeliest others.
    """

    loop: int
    block: int
    text: str
    answer: str | None
    probability: float
    is_complete: bool
    agrees: bool
    tokens: tuple[tuple[Candidate, ...], ...]


@dataclass(frozen=True)
class LayerReading:
    """What the head makes of a layer's state at one token of a block (the logit lens).

    Attributes:
        loop: pass over the blocks, from 1.
        block: number of the block, from 1.
        place: ``"end"`` for ``</b>``, ``"memory 1"`` and so on for the block's memory tokens.
        layer: number of the layer, from 1.
        candidates: the likeliest tokens, best first.
        answer_probability: probability of the first token of the last block's readout.
    """

    loop: int
    block: int
    place: str
    layer: int
    candidates: tuple[Candidate, ...]
    answer_probability: float


@dataclass(frozen=True)
class Word:
    """A word of the prompt with the white space before it; a special token is a word by itself."""

    text: str
    num_tokens: int
    is_special: bool


@dataclass(frozen=True)
class LayerGroup:
    """Some layers in a row, from ``first`` to ``last``, counted from 1."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class BlockAttention:
    """Where a block's tokens look: means over its tokens, the heads and the layers of a group; they sum to 1.

    Attributes:
        loop: pass over the blocks, from 1.
        block: number of the block, from 1.
        layers: name of the group of layers.
        words: share of each word of the prompt.
        earlier_blocks: share of the blocks before it.
        own_block: share of the block itself.
        elsewhere: the rest, which a base's attention may give to no token at all.
    """

    loop: int
    block: int
    layers: str
    words: tuple[float, ...]
    earlier_blocks: float
    own_block: float
    elsewhere: float


@dataclass(frozen=True)
class Alternative:
    """The answer with changed blocks.

    Attributes:
        name: ``"removed"``, ``"shuffled"`` or ``"swapped"``.
        description: what was changed, in one line.
        donor: for ``"swapped"``, the question whose blocks were used.
        donor_answer: the answer to that question with its own blocks.
        text: what the model wrote.
        answer: the answer in it.
        probability: of the whole text, EOS included.
        is_complete: whether it ended within the limit of tokens.
        agrees: whether the answer is the one with the question's own blocks.
    """

    name: str
    description: str
    donor: Question | None
    donor_answer: str | None
    text: str
    answer: str | None
    probability: float
    is_complete: bool
    agrees: bool


@dataclass(frozen=True)
class Chain:
    """What the base alone, with the adapter disabled, writes when it is asked to reason step by step.

    Attributes:
        prompt: how it was asked.
        text: what it wrote.
        answer: the answer in it.
        num_tokens: tokens written, EOS included.
        is_complete: whether it ended within the limit of tokens.
        agrees: whether the answer is the adapter's.
        ms: milliseconds from the prompt to the last token; one run.
        adapter_ms: the same for the adapter's answer.
        adapter_tokens: tokens of the adapter's answer, EOS included.
    """

    prompt: str
    text: str
    answer: str | None
    num_tokens: int
    is_complete: bool
    agrees: bool
    ms: float
    adapter_ms: float
    adapter_tokens: int


@dataclass(frozen=True)
class Selection:
    """The block that a rule would answer from, and the rule's score of each block, if it has scores."""

    rule: str
    block: int
    scores: tuple[float, ...] | None


@dataclass(frozen=True)
class QuestionInspection:
    """Everything about one question.

    Attributes:
        question: text or chat messages.
        num_tokens: tokens of the prompt.
        words: the prompt as the model sees it, in words; their texts joined are the prompt.
        readouts: by block.
        first_block: the first block whose readout gives the answer of the last one; None without an answer.
        settled_block: the first block from which on all readouts give it.
        lens: readings of the layers; None if the base's layers cannot be read.
        attention: by block and group of layers; None if the base returns no attention weights.
        alternatives: what if the blocks were changed.
        chain: the base's written chain; None if it was not asked for.
        selection: the block chosen by each rule.
        missing: why a part is not there, by its name.
    """

    question: Question
    num_tokens: int
    words: tuple[Word, ...]
    readouts: tuple[BlockReadout, ...]
    first_block: int | None
    settled_block: int | None
    lens: tuple[LayerReading, ...] | None
    attention: tuple[BlockAttention, ...] | None
    alternatives: tuple[Alternative, ...]
    chain: Chain | None
    selection: tuple[Selection, ...]
    missing: Mapping[str, str]

    @property
    def final(self) -> BlockReadout:
        """The last block's readout, which is the answer."""
        return self.readouts[-1]

    @property
    def prompt(self) -> str:
        """The prompt as text."""
        return "".join(word.text for word in self.words)


@dataclass(frozen=True)
class Inspection:
    """An adapter's thinking on some questions.

    Attributes:
        adapter: its name.
        base: name of its base.
        method: the recipe's method; None for an adapter that was saved by hand.
        num_loops: passes over the blocks; always 1 so far.
        num_blocks: blocks after each prompt.
        block_size: memory tokens of a block.
        num_layers: layers of the base.
        first_layer: the first layer, from 1, in which blocks take part.
        layer_groups: groups that attention is averaged over; the first one is all layers.
        seed: of the shuffled blocks.
        questions: one inspection for each question.
    """

    adapter: str
    base: str
    method: str | None
    num_loops: int
    num_blocks: int
    block_size: int
    num_layers: int
    first_layer: int
    layer_groups: tuple[LayerGroup, ...]
    seed: int
    questions: tuple[QuestionInspection, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the document, ready for JSON: probabilities and shares rounded to 6 digits."""
        return {"kind": KIND, "format": FORMAT, "rim_peft": __version__, **_rounded(asdict(self))}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
