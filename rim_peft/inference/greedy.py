"""Greedy answers by a model's own ``generate``, and those of a base that was not trained to end them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from rim_peft.inference.answerer import Answerer
from rim_peft.inference.decoding import missing_inputs
from rim_peft.sequence.layout import pad_left
from rim_peft.tuner.bases import CACHE, check_cache_name, evaluation_mode, has_full_attention, input_device


def generate_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int | Collection[int] | None,
    pad_id: int,
    max_new_tokens: int,
    num_shared: int = 0,
    on_token: Callable[[], None] | None = None,
    **options: Any,
) -> list[list[int]]:
    """Return the answer to each prompt, EOS included if reached, regardless of the base's own generation settings.

    Args:
        model: a causal language model, with or without a RiM adapter.
        prompts: token ids of each prompt, without blocks; they are padded on the left.
        eos_id: what ends an answer: one token, any of several, or None for none.
        max_new_tokens: most tokens of an answer, EOS included.
        num_shared: tokens with which all prompts begin, fewer than the shortest has; they are computed once. Only for a
            model without blocks that :func:`can_share` accepts.
        on_token: called after each new token of all answers, for measurements.
        options: more arguments of ``generate``, such as ``num_blocks``.

    Raises:
        ValueError: the installed transformers would not give the base its cache, or ``generate`` refuses the call.
    """
    if not prompts:
        return []
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    check_cache_name(base)
    # Padding is on the left, but behind what is shared, so that this has the same columns in every row.
    own, mask = pad_left([prompt[num_shared:] for prompt in prompts], pad_id, device=input_device(base))
    shared = own.new_tensor(list(prompts[0][:num_shared])).expand(len(prompts), num_shared)
    ids, mask = torch.cat([shared, own], dim=1), torch.cat([torch.ones_like(shared), mask], dim=1)
    if on_token is not None:
        options["streamer"] = _Streamer(on_token)
    with evaluation_mode(base), _plain_settings(base):
        if num_shared:
            options[CACHE] = _compute_once(base, prompts[0][:num_shared], copies=len(prompts))
        output = base.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(_ends(eos_id)) or None,
            pad_token_id=pad_id,
            **options,
        )
    return [cut_behind_eos(answer, eos_id) for answer in output[:, ids.shape[1] :].tolist()]


def can_share(base: Any) -> bool:
    """Tell whether what prompts begin with can be computed once: with full attention in every layer, by positions."""
    return has_full_attention(base.config) and not getattr(base.config, "alibi", False) and not missing_inputs(base)


@torch.no_grad()
def _compute_once(base: Any, ids: Sequence[int], *, copies: int) -> DynamicCache:
    """Return the keys and values of tokens, for several rows that begin with them."""
    cache = DynamicCache()
    base(input_ids=torch.tensor([list(ids)], device=input_device(base)), logits_to_keep=1, **{CACHE: cache})
    cache.batch_repeat_interleave(copies)
    return cache


class _Streamer:
    """Calls ``on_token`` for each new token; a streamer's first call contains the prompts."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token = on_token
        self.has_prompts = False

    def put(self, value: Any) -> None:
        """Count a new token of every row."""
        if self.has_prompts:
            self.on_token()
        self.has_prompts = True

    def end(self) -> None:
        """Do nothing."""


def cut_behind_eos(answer: list[int], eos_id: int | Collection[int] | None) -> list[int]:
    """Return an answer's tokens up to its first EOS, or all of them if there is none."""
    ends = _ends(eos_id)
    return answer[: next((place for place, token in enumerate(answer, start=1) if token in ends), len(answer))]


def _ends(eos_id: int | Collection[int] | None) -> set[int]:
    return set() if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)


def own_ends(base: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end what a base writes by itself: those of its generation settings, and EOS.

    A chat model may end its turns with another token than the tokenizer's EOS, such as Gemma with ``<end_of_turn>``.
    """
    return sorted(_ends(getattr(base.generation_config, "eos_token_id", None)) | _ends(tokenizer.eos_token_id))


class PlainAnswerer(Answerer):
    """Answers by a model's own ``generate`` right after the prompt."""

    between: ClassVar[str | None] = None

    @property
    def suppressed(self) -> list[int]:
        """Tokens that it must not write."""
        return []

    @property
    def num_between(self) -> int:
        """0: nothing is between a prompt and its answer."""
        return 0

    def decode(
        self, prompts: Sequence[Sequence[int]], *, on_token: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """Decode a batch."""
        return generate_greedily(
            self.model,
            prompts,
            eos_id=self.ends,
            pad_id=self.pad_id,
            max_new_tokens=self.max_new_tokens,
            on_token=on_token,
            suppress_tokens=self.suppressed or None,
        )


class BaseAnswerer(PlainAnswerer):
    """Answers as an untrained base does, up to one of its own ends."""

    @property
    def ends(self) -> list[int]:
        """The base's own ends and EOS."""
        return own_ends(self.model.get_base_model(), self.tokenizer)


@contextmanager
def _plain_settings(base: Any) -> Iterator[None]:
    """Temporarily remove a base's own generation settings, which leaves plain greedy search."""
    # Passing a configuration to generate is not enough: transformers fills its unset options from the base's own.
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
