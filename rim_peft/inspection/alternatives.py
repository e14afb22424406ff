"""What if: the answer with changed blocks, and what the base writes without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import StopStringCriteria

from rim_peft.chains.prompts import Prompts
from rim_peft.data.examples import Example, Question, RowError
from rim_peft.evaluation.controls import shuffle_ids
from rim_peft.evaluation.latency import Way, by_answerer, measure_latency
from rim_peft.inference import Answerer, BlockAnswerer, BlockDecoder, Decoded
from rim_peft.inference.greedy import generate_greedily, own_ends
from rim_peft.inference.swapping import SwappingDecoder, check_swaps
from rim_peft.inspection.document import Alternative, Chain
from rim_peft.tasks.rows import OwnRows
from rim_peft.tuner.bases import num_positions
from rim_peft.tuner.config import active_config

_MOST_DONORS = 8
_CHAIN_TOKENS = 256

ReadAnswer = Callable[[str], str | None]
"""Reads the answer in a text; None if there is none."""


@dataclass(frozen=True)
class Asked:
    """A question as the model gets it, and the answer that alternatives are compared with."""

    question: Question
    prompt: Sequence[int]
    answer: str | None
    read: ReadAnswer

    def agrees(self, answer: str | None) -> bool:
        """Tell whether an answer is the question's own."""
        return answer is not None and answer == self.answer


@dataclass(frozen=True)
class Donor:
    """Another question, whose blocks may be used: its prompt and its own answer."""

    question: Question
    prompt: Sequence[int]
    answer: str | None


def find_donor(
    answerer: BlockAnswerer,
    asked: Asked,
    others: Sequence[tuple[Question, Sequence[int]]],
    reader: Callable[[Question], ReadAnswer],
) -> Donor:
    """Return the first other question with a prompt of as many tokens and another answer.

    If the answers of the first few are all the same, the first question is returned.

    Args:
        others: other questions with their prompts.
        reader: gives how to read the answers to a question.

    Raises:
        ValueError: no other question has a prompt of as many tokens.
    """
    fitting = [(question, prompt) for question, prompt in others if len(prompt) == len(asked.prompt)]
    fitting = [(question, prompt) for question, prompt in fitting if list(prompt) != list(asked.prompt)][:_MOST_DONORS]
    donors = []
    for question, prompt in fitting:
        (text,) = answerer.answer_prompts([prompt], batch_size=1)
        donors.append(Donor(question, prompt, reader(question)(text)))
        if donors[-1].answer not in (None, asked.answer):
            return donors[-1]
    if donors:
        return donors[0]
    lengths = sorted({len(prompt) for _, prompt in others})
    raise ValueError(
        f"donor: must be another question whose prompt has {len(asked.prompt)} tokens as well, since keys hold their "
        f"positions, got {f'prompts of {lengths} tokens' if lengths else 'no other question'}. Give one with --donor."
    )


def remove_blocks(answerer: BlockAnswerer, asked: Asked) -> Alternative:
    """Answer directly after the prompt."""
    decoded = _decoder(BlockDecoder, answerer, num_blocks=0)([asked.prompt])
    return _alternative("removed", "no blocks: the answer follows the prompt", answerer, asked, decoded)


def shuffle_blocks(answerer: BlockAnswerer, asked: Asked, *, seed: int) -> Alternative:
    """Answer after the blocks' tokens in a random order.

    Raises:
        ValueError: the model's blocks cannot be exchanged.
    """
    check_swaps(answerer.model)
    ids = shuffle_ids(active_config(answerer.model).block_tokens.ids(answerer.num_blocks), seed=seed)
    decoded = _decoder(BlockDecoder, answerer, num_blocks=0)([[*asked.prompt, *ids]])
    described = "the blocks' tokens in a random order, </b> at the end"
    return _alternative("shuffled", described, answerer, asked, decoded)


def swap_blocks(answerer: BlockAnswerer, asked: Asked, donor: Donor) -> Alternative:
    """Answer with the keys and values of another question's blocks.

    Raises:
        ValueError: the model's blocks cannot be exchanged.
    """
    check_swaps(answerer.model)
    decoder = _decoder(SwappingDecoder, answerer, num_blocks=answerer.num_blocks)
    decoded = decoder.swap([asked.prompt], [donor.prompt])
    described = "all blocks hold the keys and values of another question"
    return _alternative("swapped", described, answerer, asked, decoded, donor=donor)


def _decoder(kind: Any, answerer: BlockAnswerer, *, num_blocks: int) -> Any:
    return kind(
        answerer.model,
        eos_id=answerer.eos_id,
        pad_id=answerer.pad_id,
        num_blocks=num_blocks,
        max_new_tokens=answerer.max_new_tokens,
    )


def _alternative(
    name: str, description: str, answerer: Answerer, asked: Asked, decoded: Decoded, *, donor: Donor | None = None
) -> Alternative:
    ((ids,),) = decoded.token_ids
    text = answerer.read(ids)
    answer = asked.read(text)
    return Alternative(
        name=name,
        description=description,
        donor=None if donor is None else donor.question,
        donor_answer=None if donor is None else donor.answer,
        text=text,
        answer=answer,
        probability=math.exp(sum(decoded.log_probs[0][0])),
        is_complete=answerer.has_ended(ids),
        agrees=asked.agrees(answer),
    )


def write_chain(
    answerer: BlockAnswerer, asked: Asked, *, template: str | None = None, max_new_tokens: int | None = None
) -> Chain:
    """Let the base write its reasoning out, with the adapter disabled, and time both ways of answering.

    Args:
        template: how the base is asked, with ``{question}``; by default step by step, as teachers are asked.
        max_new_tokens: most tokens of the chain, EOS included; by default 256, or as many as the base's positions hold.

    Raises:
        ValueError: the template has no ``{question}``, or the chain has no room in the base's positions.
    """
    tokenizer: Any = answerer.tokenizer
    reader = OwnRows(split_steps="lines", answer_from="after:####")
    prompts = Prompts(reader, template=template, is_chat=bool(tokenizer.chat_template))
    own = BlockAnswerer(
        answerer.model, tokenizer, templates=prompts.templates, num_blocks=0, max_new_tokens=max_new_tokens or 1
    )
    (ids,) = own.encode([prompts.ask(Example(asked.question, "?"))], name="chain")
    most = max_new_tokens or _fitting_tokens(answerer.model.config, ids)
    written: dict[str, list[int]] = {}
    ends = set(own_ends(answerer.model.get_base_model(), tokenizer))
    stops = _stop_strings(prompts.stops, tokenizer)

    def write(batch: Any, on_token: Callable[[], None]) -> list[list[int]]:
        with answerer.model.disable_adapter():
            options = {"eos_id": ends, "pad_id": own.pad_id, "max_new_tokens": most, **stops}
            (written["chain"],) = rows = generate_greedily(answerer.model, batch, on_token=on_token, **options)
        return rows

    ways = [
        by_answerer("adapter", [asked.prompt], answerer),
        Way("chain", [ids], write, device=answerer.model.device),
    ]
    adapter, chain = measure_latency(ways, num_questions=1, warm_up=0, min_rounds=1)
    text = own.read(written["chain"])
    for stop in prompts.stops:  # where the next question would begin
        text = text.partition(stop)[0]
    answer = _chain_answer(text, reader, asked.read)
    return Chain(
        prompt=str(tokenizer.decode(ids)),
        text=text,
        answer=answer,
        num_tokens=len(written["chain"]),
        is_complete=len(written["chain"]) < most or not ends.isdisjoint(written["chain"]),
        agrees=asked.agrees(answer),
        ms=chain.answer_ms,
        adapter_ms=adapter.answer_ms,
        adapter_tokens=round(adapter.num_tokens),
    )


def _fitting_tokens(config: Any, prompt: Sequence[int]) -> int:
    """Return the default length of a chain: what the base's positions leave after the prompt, up to a limit."""
    room = num_positions(config)
    return _CHAIN_TOKENS if room is None else min(_CHAIN_TOKENS, room - len(prompt))


def _stop_strings(stops: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """Return what ends generation at stop strings; nothing where transformers cannot find them, as in whole words."""
    if not stops:
        return {}
    try:
        StopStringCriteria(tokenizer, list(stops))
    except ValueError:
        return {}
    return {"stop_strings": list(stops), "tokenizer": tokenizer}


def _chain_answer(text: str, reader: OwnRows, read: ReadAnswer) -> str | None:
    """Return the answer that ends a chain: after its mark if it has one, otherwise as the task reads texts."""
    try:
        return read(reader.read_text(text)[0])
    except RowError:
        answer = read(text)
    return None if answer is not None and "\n" in answer else answer  # a rule that takes any text whole
