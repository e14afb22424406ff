"""Continuous thoughts: hidden states that are fed back as input, one pass each, after a prompt and ``<b>``.

This is the method Coconut, a baseline for RiM. ``<b>`` and ``</b>`` replace the paper's ``<bot>`` and ``<eot>``::

    question  <b>  thought 1 ... thought N  </b>  text

A thought's input embedding is the head's input at the token before it: at ``<b>`` for the first thought, then at the
previous thought. So thoughts are computed one after the other, and training differentiates through all of them.

Source: Hao et al., "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from rim_peft.tuner.bases import CACHE, check_layers
from rim_peft.tuner.config import active_config


@dataclass(frozen=True)
class Thoughts:
    """A batch of B prompts with its thoughts, ready to be continued.

    Attributes:
        cache: keys and values of C columns: prompts padded on the left, ``<b>``, and all thoughts but the last.
        mask: (B, C) int64, 1 for a token, 0 for padding.
        last: (B, 1, H) the last thought, not run yet: it runs with the tokens that follow; (B, 0, H) without thoughts.
    """

    cache: DynamicCache
    mask: Tensor
    last: Tensor

    def followed_by(self, base: Any, token_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the base's inputs for the last thought and the tokens after it.

        Args:
            token_ids: (B, Q) tokens, padded on the right.
            mask: (B, Q) int64, 1 for a token, 0 for padding.
        """
        embeds = base.get_input_embeddings()(token_ids)
        embeds = torch.cat([self.last.to(embeds.dtype), embeds], dim=1)
        num_columns = self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(self.last.shape[:2]), mask], dim=1)
        return {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": _positions(mask)[:, num_columns:],
            CACHE: self.cache,
            "use_cache": True,
        }


def check_thinks(model: PeftModel) -> None:
    """Refuse models that cannot read their hidden states as input with a cache.

    Raises:
        ValueError: there is no active RIM adapter, its blocks change layers, the base has layers without a cache of
            keys and values, or it does not take embeddings.
    """
    config = active_config(model)
    for name in ("insertion_layer", "bidirectional_blocks"):
        if value := getattr(config, name, None):
            raise ValueError(f"{name}: continuous thoughts have no blocks, got {value!r}. Omit it.")
    base: Any = model.get_base_model()
    check_layers(base.config)
    needed = {"inputs_embeds", "position_ids", CACHE}
    missing = needed - inspect.signature(base.base_model.forward).parameters.keys()
    if missing:
        raise ValueError(
            f"model: must take {', '.join(sorted(missing))} for continuous thoughts, but {type(base).__name__} does "
            "not. Use another base."
        )


def think(model: PeftModel, prompt_ids: Tensor, mask: Tensor, *, num_thoughts: int) -> Thoughts:
    """Run prompts and ``<b>`` once, then one pass for each thought but the last.

    If gradients are enabled, they flow through all passes.

    Args:
        model: a model with an active RIM adapter, whose ``<b>`` row is used.
        prompt_ids: (B, P) prompts, padded on the left.
        mask: (B, P) int64, 1 for a token, 0 for padding.
        num_thoughts: thoughts after every prompt, N.

    Raises:
        ValueError: gradient checkpointing is on; it runs layers without a cache.
    """
    base: Any = model.get_base_model()
    if base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError(
            "gradient_checkpointing: must be off for continuous thoughts, which need the cache of earlier passes, "
            "got a model where it is on. Call gradient_checkpointing_disable()."
        )
    begin = prompt_ids.new_full((len(prompt_ids), 1), active_config(model).block_tokens.begin)
    inputs: dict[str, Tensor] = {"input_ids": torch.cat([prompt_ids, begin], dim=1)}
    mask = torch.cat([mask, torch.ones_like(begin)], dim=1)
    cache = DynamicCache()  # without sliding layers, which drop keys by column, not by position
    state = _run(base, cache, mask, inputs)
    for _ in range(num_thoughts - 1):
        mask = torch.cat([mask, torch.ones_like(begin)], dim=1)
        state = _run(base, cache, mask, {"inputs_embeds": state})
    return Thoughts(cache, mask, last=state[:, : min(1, num_thoughts)])


def _run(base: Any, cache: DynamicCache, mask: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Run the last columns of a mask, and return the head's input at the last one, (B, 1, H)."""
    (new,) = inputs.values()
    output = base.base_model(
        **inputs,
        attention_mask=mask,
        position_ids=_positions(mask)[:, -new.shape[1] :],
        use_cache=True,
        **{CACHE: cache},
    )
    state: Tensor = output.last_hidden_state[:, -1:]
    return state.to(device=new.device, dtype=base.get_input_embeddings().weight.dtype)


def _positions(mask: Tensor) -> Tensor:
    """Return token positions, counted from 0 without padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)
