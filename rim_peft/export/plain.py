"""An adapter as an export starts from it: on a base that is not quantised, with what it answers."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from rim_peft.export.checking import Expected, expect
from rim_peft.export.options import Prompts
from rim_peft.export.weights import dequantized, quantization_of
from rim_peft.tuner.tensors import not_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter on a base that is not quantised, in float32, and what it answers.

    Attributes:
        model: the adapter on its base.
        dtype: the base's own type.
        quantization: how the base was quantised; None if it was not.
        expected: what the plugin answers on this base.
        agreement: how many of these answers the adapter gives on the quantised base too; None if it was not quantised.
    """

    model: PeftModel
    dtype: torch.dtype
    quantization: str | None
    expected: list[Expected]
    agreement: int | None


def as_plain(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, *, num_blocks: int
) -> PlainAdapter:
    """Dequantise an adapter's base if need be, and let the plugin answer the prompts in float32.

    An export is checked in float32 too: with both in a half type, the rounding of two ways to the same sum would decide
    wherever two tokens lie near each other.

    Raises:
        ValueError: the adapter's weights are not finite, or weights are offloaded, or quantised in a way that cannot be
            undone.
    """
    if num_offloaded := sum(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"model: must have its weights in memory to be exported, got {num_offloaded} that are offloaded by a "
            "device_map. Load the base without it."
        )
    adapter = get_peft_model_state_dict(model, adapter_name=str(model.active_adapter), save_embedding_layers=False)
    if (found := not_finite(adapter)) is not None:
        raise ValueError(
            f"adapter: its weights must be finite to be exported, {found}: its training had diverged. Train it again "
            "with a lower learning_rate."
        )
    asking: dict[str, Any] = {
        "templates": prompts.templates,
        "num_blocks": num_blocks,
        "max_new_tokens": prompts.max_new_tokens,
    }
    quantization = quantization_of(model)
    quantized = None
    if quantization is not None:
        logger.info("The base is quantised (%s): the adapter is exported with its weights dequantised.", quantization)
        quantized = expect(model, tokenizer, prompts.questions, **asking)
        model = dequantized(model)
    base: Any = model.get_base_model()
    dtype: torch.dtype = base.dtype
    model.float()
    expected = expect(model, tokenizer, prompts.questions, **asking)
    if quantized is None:
        return PlainAdapter(model, dtype, quantization, expected, None)
    agreement = sum(before.answer == after.answer for before, after in zip(quantized, expected, strict=True))
    logger.info("Quantised and dequantised base give the same tokens on %d of %d prompts.", agreement, len(expected))
    return PlainAdapter(model, dtype, quantization, expected, agreement)


def free(model: Any) -> None:
    """Give a model's memory back, whoever still refers to it: a fresh process is about to need it."""
    model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
