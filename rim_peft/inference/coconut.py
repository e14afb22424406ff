"""Decoding after continuous thoughts (Coconut), a baseline for RiM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rim_peft.inference.decoding import check_prompts, cut_behind_eos
from rim_peft.sequence.layout import pad_left
from rim_peft.tuner.bases import evaluation_mode, input_device
from rim_peft.tuner.config import active_config
from rim_peft.tuner.thoughts import think


def decode_with_thoughts(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_thoughts: int,
    eos_id: int | None,
    max_new_tokens: int = 64,
    on_token: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Decode a batch of prompts greedily after their thoughts, in ``max(1, N)`` passes plus one per token.

    Args:
        prompts: token ids of each prompt, at least one.
        num_thoughts: thoughts after each prompt, N.
        max_new_tokens: most tokens of an answer, EOS included.
        on_token: called after each new token of all answers, for measurements.

    Returns:
        Each answer's tokens, EOS included if reached.

    Raises:
        ValueError: there are no prompts, or a prompt is empty.
    """
    check_prompts(prompts)
    base: Any = model.get_base_model()
    ids, mask = pad_left(prompts, 0, device=input_device(model))
    with torch.no_grad(), evaluation_mode(model):
        thoughts = think(model, ids, mask, num_thoughts=num_thoughts)
        new = ids.new_full((len(prompts), 1), active_config(model).block_tokens.end)
        inputs = thoughts.followed_by(base, new, torch.ones_like(new))
        answers: list[Tensor] = []
        is_done = torch.zeros_like(new, dtype=torch.bool)
        while True:
            new = base(**inputs, logits_to_keep=1).logits.argmax(-1)
            answers.append(new)
            if on_token is not None:
                on_token()
            is_done = is_done | (new == (-1 if eos_id is None else eos_id))  # no token is -1
            if len(answers) == max_new_tokens or bool(is_done.all()):
                break
            inputs = {
                "input_ids": new,
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
                "position_ids": inputs["position_ids"][:, -1:] + 1,
                "past_key_values": thoughts.cache,
                "use_cache": True,
            }
    return [cut_behind_eos(answer, eos_id) for answer in torch.cat(answers, dim=1).tolist()]
