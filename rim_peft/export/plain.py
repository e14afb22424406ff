"""An adapter as an export starts from it: on a base that is not quantised, with what it answers."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.export.checking import Expected, expect
from rim_peft.export.options import Prompts
from rim_peft.export.weights import dequantized, quantization_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter on a base that is not quantised, and what it answers.

    Attributes:
        model: the adapter on its base.
        quantization: how the base was quantised; None if it was not.
        expected: what the plugin answers on this base.
        agreement: how many of these answers the adapter gave on the quantised base; None if it was not quantised.
    """

    model: PeftModel
    quantization: str | None
    expected: list[Expected]
    agreement: int | None


def as_plain(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, *, num_blocks: int
) -> PlainAdapter:
    """Dequantise an adapter's base if need be, and let the plugin answer the prompts."""
    asking: dict[str, Any] = {
        "templates": prompts.templates,
        "num_blocks": num_blocks,
        "max_new_tokens": prompts.max_new_tokens,
    }
    quantization = quantization_of(model)
    expected = expect(model, tokenizer, prompts.questions, **asking)
    if quantization is None:
        return PlainAdapter(model, None, expected, None)
    logger.info("The base is quantised (%s): the export holds its weights dequantised, not those before.", quantization)
    model = dequantized(model)
    quantized, expected = expected, expect(model, tokenizer, prompts.questions, **asking)
    agreement = sum(before.answer == after.answer for before, after in zip(quantized, expected, strict=True))
    logger.info(
        "On the dequantised base, the adapter gives the same tokens as on the quantised one for %d of %d prompts.",
        agreement,
        len(expected),
    )
    return PlainAdapter(model, quantization, expected, agreement)


def free(model: Any) -> None:
    """Give a model's memory back, whoever still refers to it: a fresh process is about to need it."""
    model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
