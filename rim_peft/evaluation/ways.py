"""Ways of answering that can be timed: through ``generate``, a block decoder, or continuous thoughts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.evaluation.accuracy import answer_start
from rim_peft.inference.coconut import decode_with_thoughts
from rim_peft.inference.decoding import BlockDecoder
from rim_peft.inference.generation import generate_greedily

Prompts = Sequence[Sequence[int]]
"""Token ids of each prompt, without blocks or padding."""

Answer = Callable[[Prompts, Callable[[], None]], list[list[int]]]
"""``f(prompts, on_token)`` writes an answer for each prompt and returns its tokens, EOS included.

It calls ``on_token()`` whenever every row that is still being written has one token more."""

AnswerTokens = int | Callable[[Sequence[int]], int] | None


@dataclass(frozen=True)
class Way:
    """One way of answering questions.

    Attributes:
        name: what it is called in the figures.
        prompts: token ids of the prompt of each question.
        answer: answers a batch of prompts.
        answer_tokens: how many tokens at the end of what is written are the answer, EOS included: a number, or a
            function of the tokens written (:func:`count_behind`); None if all of them are.
        device: where it computes.
    """

    name: str
    prompts: Prompts
    answer: Answer
    answer_tokens: AnswerTokens = None
    device: torch.device | str = "cpu"


def by_generate(
    name: str,
    prompts: Prompts,
    model: Any,
    *,
    eos_id: int | None,
    pad_id: int,
    max_new_tokens: int = 64,
    answer_tokens: AnswerTokens = None,
    **options: Any,
) -> Way:
    """Return the way of a model's own greedy ``generate``, prompts padded on the left.

    Args:
        name: the way's name.
        prompts: token ids of each question's prompt.
        model: a causal language model, with or without a RiM adapter.
        eos_id: the token that ends what is written, None for none.
        pad_id: id to pad with; padding is masked.
        max_new_tokens: tokens written at most, EOS included.
        answer_tokens: see :class:`Way`.
        options: more arguments of ``generate``, as ``num_blocks``.
    """

    def answer(batch: Prompts, on_token: Callable[[], None]) -> list[list[int]]:
        return generate_greedily(
            model,
            batch,
            eos_id=eos_id,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            streamer=_Streamer(on_token),
            **options,
        )

    return Way(name, prompts, answer, answer_tokens, model.device)


def by_decoder(name: str, prompts: Prompts, decoder: BlockDecoder) -> Way:
    """Return the way of a block decoder; the answer is the one after the last block.

    A compiled decoder compiles when prompts of a new length come: let ``warm_up`` bring the longest and the shortest.
    """

    def answer(batch: Prompts, on_token: Callable[[], None]) -> list[list[int]]:
        return [answers[-1] for answers in decoder(batch, on_token=on_token).token_ids]

    return Way(name, prompts, answer, device=decoder.model.device)


def by_thoughts(
    name: str, prompts: Prompts, model: PeftModel, *, num_thoughts: int, eos_id: int | None, max_new_tokens: int = 64
) -> Way:
    """Return the way of continuous thoughts (Coconut); the arguments are those of ``decode_with_thoughts``."""

    def answer(batch: Prompts, on_token: Callable[[], None]) -> list[list[int]]:
        return decode_with_thoughts(
            model,
            batch,
            num_thoughts=num_thoughts,
            eos_id=eos_id,
            max_new_tokens=max_new_tokens,
            on_token=on_token,
        )

    return Way(name, prompts, answer, device=model.device)


def count_behind(tokenizer: PreTrainedTokenizerBase, separator: str) -> Callable[[Sequence[int]], int]:
    """Return a function that counts the tokens from an answer's first one on, EOS included.

    Args:
        tokenizer: the base's tokenizer.
        separator: what stands behind each step. The answer begins with the token that brings the first character, white
            space aside, behind the last separator; without a separator, with the first token.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def count(tokens: Sequence[int]) -> int:
        behind = answer_start(decode(tokens), separator)
        begins = (index for index in range(len(tokens)) if decode(tokens[: index + 1])[behind:].strip())
        return len(tokens) - next(begins, len(tokens))

    return count


class _Streamer:
    """Notes tokens; the first call of a streamer brings the prompts."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token = on_token
        self.has_prompts = False

    def put(self, value: Any) -> None:
        """Note a token of every row."""
        if self.has_prompts:
            self.on_token()
        self.has_prompts = True

    def end(self) -> None:
        """Nothing is left to note."""
