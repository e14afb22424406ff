"""Answering leaves a model in the mode that it found it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rim_peft.inference import answer_questions, answer_with_thoughts, read_blocks
from rim_peft.inference.greedy import generate_greedily
from rim_peft.tuner.bases import evaluation_mode
from tests.conftest import PAD_ID, build_rim

WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "answers": lambda model, tokenizer: next(answer_questions(model, tokenizer, ["2+3"], max_new_tokens=3)),
    "readouts": lambda model, tokenizer: read_blocks(model, tokenizer, ["2+3"], max_new_tokens=3)[0][1].token_ids,
    "thoughts": lambda model, tokenizer: next(
        answer_with_thoughts(model, tokenizer, ["2+3"], num_thoughts=2, max_new_tokens=3)
    ),
    "generate": lambda model, tokenizer: generate_greedily(
        model, [[7, 8]], eos_id=None, pad_id=PAD_ID, max_new_tokens=3
    ),
}


def _modes(model: Any) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("way", WAYS)
def test_every_module_gets_its_mode_back(way: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=2, lora_dropout=0.5)
    expected = WAYS[way](model, tokenizer)
    assert not any(_modes(model))
    model.train()
    model.get_base_model().model.layers[0].eval()
    before = _modes(model)
    torch.manual_seed(0)
    assert WAYS[way](model, tokenizer) == expected  # no dropout
    assert _modes(model) == before


def test_modes_come_back_after_an_error() -> None:
    model = build_rim().train()
    with pytest.raises(ValueError, match="input_ids"), evaluation_mode(model):
        model()
    assert all(_modes(model))
