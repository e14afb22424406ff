"""Every block's readout of a question, and one answer from several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Templates
from rim_peft.data.preparation import Question, tokenize_prompts
from rim_peft.data.tokenization import padding_id
from rim_peft.inference.decoding import BlockDecoder, can_decode, check_number, generate_greedily
from rim_peft.tuner.config import active_config

Blocks = NDArray[np.int64]
"""(N,) for each question the index of the block, from 0, whose readout is the answer."""


def select_final(num_questions: int, num_blocks: int) -> Blocks:
    """Choose the last block: RiM's own answer."""
    return np.full(num_questions, num_blocks - 1)


def select_by_vote(answers: Sequence[Sequence[str | None]]) -> Blocks:
    """Choose the answer that most blocks give, from the last block that gives it.

    Readouts that give no answer don't vote; where none does, the last block is chosen. Of answers with equally many
    votes the one that the later block gives wins, since later blocks are trained to be surer.

    >>> select_by_vote([["1", "2", "2", "3"], ["1", "2", None, "3"], [None, None]]).tolist()
    [2, 3, 1]
    """
    return np.array([_vote(row) for row in answers], dtype=np.int64)


def _vote(answers: Sequence[str | None]) -> int:
    voting = [(answers.count(answer), block) for block, answer in enumerate(answers) if answer is not None]
    return max(voting)[1] if voting else len(answers) - 1


def select_by_confidence(log_probs: ArrayLike) -> Blocks:
    """Choose the block that is surest of its readout: with the largest (N, K) log-probability, the later of equals.

    A readout's log-probability is the sum over its tokens, so that a longer answer is not preferred for its length.

    >>> select_by_confidence([[-0.5, -0.1, -0.3], [-0.2, -0.2, -0.9]]).tolist()
    [1, 1]
    """
    return _last_largest(np.asarray(log_probs))


def select_by_score(scores: ArrayLike) -> Blocks:
    """Choose the block with the largest (N, K) score, such as a probe's, the later of equals."""
    return _last_largest(np.asarray(scores))


def _last_largest(values: NDArray[np.float64]) -> Blocks:
    reverse = values[:, ::-1].argmax(axis=1)
    return values.shape[1] - 1 - reverse


@dataclass(frozen=True)
class Readout:
    """What one block's readout says, decoded greedily.

    Attributes:
        block: the block's number, from 1.
        text: the readout as text, without EOS and surrounding space.
        token_ids: the readout's tokens, EOS included if it was reached.
        token_log_probs: natural logarithm of each token's probability.
        hidden_state: (H,) float32, the last layer's state at the block's end, which the head reads.
    """

    block: int
    text: str
    token_ids: list[int]
    token_log_probs: list[float]
    hidden_state: Tensor


def answer_questions(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    on_cut: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Answer questions greedily after the last block, one text per question, in their order.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        questions: texts or chats.
        templates: how a prompt is written; the ones that the adapter was trained with.
        num_blocks: blocks after each prompt; the adapter's own if not given.
        max_new_tokens: tokens of an answer at most, EOS included.
        batch_size: questions answered at a time; it does not change the answers.
        on_cut: called with each answer that had not ended within ``max_new_tokens``.

    Raises:
        ValueError: the model has no active RIM adapter, a number is out of range, or a question leaves no room for its
            answer in the base's positions.
    """
    decoder = _decoder(model, tokenizer, num_blocks=num_blocks, max_new_tokens=max_new_tokens)
    check_number("batch_size", batch_size, least=1)
    prompts = tokenize_prompts(questions, tokenizer, templates, vocab_size=decoder.blocks.begin)
    decoder.check_room(prompts, name="questions")
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        if can_decode(model):
            answers = [answer for (answer,) in decoder(batch).token_ids]
        else:
            answers = generate_greedily(
                model,
                batch,
                eos_id=tokenizer.eos_token_id,
                pad_id=decoder.pad_id,
                max_new_tokens=max_new_tokens,
                num_blocks=decoder.num_blocks,
            )
        yield from read_texts(tokenizer, answers, on_cut=on_cut)


def read_texts(
    tokenizer: PreTrainedTokenizerBase, answers: Iterable[list[int]], *, on_cut: Callable[[str], None] | None
) -> Iterator[str]:
    """Yield answers' tokens as texts; ``on_cut`` is called with each that does not end in EOS."""
    for answer in answers:
        text = _text(tokenizer, answer)
        if on_cut is not None and tokenizer.eos_token_id not in answer:
            on_cut(text)
        yield text


def read_blocks(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    max_new_tokens: int = 64,
) -> list[list[Readout]]:
    """Decode the readout of every block of every question, greedily and side by side.

    All readouts grow by one token per forward pass from one cache of the trunk, and each sees exactly what it sees in
    training and in ``generate(num_blocks=k)``; see :class:`BlockDecoder`.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        questions: texts or chats; they are one batch.
        templates: how a prompt is written.
        num_blocks: blocks after each prompt, at least 1; the adapter's own if not given.
        max_new_tokens: tokens of a readout at most, EOS included.

    Returns:
        For each question its readouts, block 1 first.

    Raises:
        ValueError: the model has no active RIM adapter, the base cannot run branching rows, a number is out of range,
            or a question leaves no room for its answer in the base's positions.
    """
    decoder = _decoder(model, tokenizer, num_blocks=num_blocks, max_new_tokens=max_new_tokens, every_block=True)
    prompts = tokenize_prompts(questions, tokenizer, templates, vocab_size=decoder.blocks.begin)
    if not prompts:
        return []
    decoder.check_room(prompts, name="questions")
    decoded = decoder(prompts)
    return [
        [
            Readout(k, _text(tokenizer, ids), ids, token_log_probs=scores, hidden_state=state)
            for k, (ids, scores, state) in enumerate(zip(*parts, strict=True), start=1)
        ]
        for parts in zip(decoded.token_ids, decoded.log_probs, decoded.states, strict=True)
    ]


def _decoder(model: PeftModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> BlockDecoder:
    pad_id = padding_id(tokenizer, active_config(model).block_tokens.begin)
    return BlockDecoder(model, eos_id=tokenizer.eos_token_id, pad_id=pad_id, **options)


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
