"""Greedy answers through a model's own ``generate``, which knows every kind of cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from rim_peft.inference.mode import evaluation_mode
from rim_peft.tuner.layers import input_device


def generate_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int | None,
    pad_id: int,
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """Return what follows each prompt, EOS included if it was reached, whatever settings the base came with.

    Args:
        model: a causal language model, with or without a RiM adapter.
        prompts: token ids of each prompt, without blocks; they are padded on the left.
        eos_id: the token that ends an answer, None for none.
        pad_id: id to pad with; padding is masked.
        max_new_tokens: tokens of an answer at most, EOS included.
        options: more arguments of ``generate``, as ``num_blocks`` and ``streamer``.
    """
    if not prompts:
        return []
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with evaluation_mode(base), _plain_settings(base):
        output = base.generate(
            input_ids=torch.tensor(ids, device=input_device(base)),
            attention_mask=torch.tensor(mask, device=input_device(base)),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            **options,
        )
    return [cut_behind_eos(answer, eos_id) for answer in output[:, longest:].tolist()]


def cut_behind_eos(answer: list[int], eos_id: int | None) -> list[int]:
    """Return an answer's tokens up to its first EOS; all of them where there is none."""
    return answer[: answer.index(eos_id) + 1] if eos_id is not None and eos_id in answer else answer


@contextmanager
def _plain_settings(base: Any) -> Iterator[None]:
    """Take a base's own generation settings away for a while: greedy search and nothing else is left.

    A configuration given to ``generate`` would not do, since what it leaves open is filled in from the base's own.
    """
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
