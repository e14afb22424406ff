"""The proof of the layout: all readouts in one pass equal the same readouts in sequences of their own.

The slow, obvious way is ``x, m_1 … m_k, readout_k`` for every ``k``: plain causal attention, positions from 0, a batch
of one, no mask. Everything the fast way does, in loss and in gradients, must agree with it.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rim_peft.sequence import BlockTokens, Layout, Sample, build_layout, keep_readouts, pack_rows
from rim_peft.training.losses import label_weights, readout_loss
from rim_peft.tuner.bases import attention_masks
from tests.training import assert_same_gradients

VOCABULARY = 48
BLOCKS = BlockTokens(begin=45, memory=46, end=47, block_size=2)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "qwen2": Qwen2Config(**{name: value for name, value in SMALL.items() if name != "head_dim"}),
    "qwen3": Qwen3Config(**SMALL),
    # A window of 6 is shorter than every row, and cuts across blocks.
    "gemma3": Gemma3TextConfig(
        **SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
}
SAMPLES = [
    Sample([1, 2, 3, 4, 5], [[10, 11, 12], [13, 14], [15, 16, 17, 18]]),
    Sample([6, 7], [[20, 21], [22, 23, 24]]),
    Sample([8, 9, 10, 11, 12, 13, 14], [[25], [26], [27, 28], [29]]),
]
WEIGHTS = torch.tensor([[0.2, 0.5, 1.0, 0.0], [1.0, 0.3, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])

every_base = pytest.mark.parametrize("name", CONFIGS)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def _base(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention, dtype=torch.float32)
    # The usual initial scale of 0.02 leaves attention nearly uniform, where a wrong mask would hardly show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def _logits(model: PreTrainedModel, layout: Layout) -> Tensor:
    masks = attention_masks(model.config, layout, dtype=torch.float32)
    logits: Tensor = model(input_ids=layout.input_ids, attention_mask=masks, position_ids=layout.position_ids).logits
    return logits


def _one_pass_loss(model: PreTrainedModel, layout: Layout, weights: Tensor) -> Tensor:
    logits = _logits(model, layout)
    labels = layout.labels()
    log_probs = logits.flatten(0, 1)[labels.places].log_softmax(-1)
    log_probs = log_probs.gather(1, labels.token_ids[:, None])[:, 0]
    return readout_loss(log_probs, label_weights(weights, labels), num_samples=len(weights))


def _separate_loss(model: PreTrainedModel, all_weights: Tensor) -> Tensor:
    total = torch.zeros(())
    for sample, weights in zip(SAMPLES, all_weights, strict=True):
        for k, readout in enumerate(sample.readouts, start=1):
            trunk = [*sample.prompt, *BLOCKS.ids(k)]
            logits = model(input_ids=torch.tensor([[*trunk, *readout]])).logits[0]
            log_probs = logits[len(trunk) - 1 : -1].log_softmax(-1)
            total = total - weights[k - 1] * log_probs[range(len(readout)), list(readout)].sum()
    return total / len(SAMPLES)


@every_base
@every_attention
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_loss_and_gradients_equal_separate_sequences(name: str, attention: str, padding_side: str) -> None:
    layout = build_layout(SAMPLES, BLOCKS, pad_id=0, padding_side=padding_side)
    _assert_equals_separate(_base(name, attention), layout, WEIGHTS)


def _assert_equals_separate(model: PreTrainedModel, layout: Layout, weights: Tensor) -> None:
    assert_same_gradients(model, _one_pass_loss(model, layout, weights), _separate_loss(model, weights))


@every_base
@every_attention
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_padded_batch_equals_its_rows_alone(name: str, attention: str, padding_side: str) -> None:
    model = _base(name, attention)
    batch = _one_pass_loss(model, build_layout(SAMPLES, BLOCKS, pad_id=0, padding_side=padding_side), WEIGHTS)
    alone = [
        _one_pass_loss(model, build_layout([sample], BLOCKS, pad_id=0), weights[None, : len(sample.readouts)])
        for sample, weights in zip(SAMPLES, WEIGHTS, strict=True)
    ]
    torch.testing.assert_close(batch, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


@every_base
@every_attention
def test_packed_rows_give_the_same_loss_and_gradients(name: str, attention: str) -> None:
    model = _base(name, attention)
    packed = pack_rows(build_layout(SAMPLES, BLOCKS, pad_id=0), 80, multiple_of=8)
    assert packed.input_ids.shape == (1, 72)
    _assert_equals_separate(model, packed, WEIGHTS)


@every_base
def test_rows_without_the_readouts_that_weigh_nothing_give_the_same_loss_and_gradients(name: str) -> None:
    model = _base(name, "sdpa")
    weights = WEIGHTS * torch.tensor([0.0, 1.0, 1.0, 1.0])
    full = build_layout(SAMPLES, BLOCKS, pad_id=0)
    annealed = keep_readouts(full, weights > 0)
    assert annealed.attention_mask.sum() < full.attention_mask.sum()
    for layout in (annealed, pack_rows(annealed, 40)):
        _assert_equals_separate(model, layout, weights)


@every_base
@every_attention
def test_a_readout_cannot_change_the_trunk_or_another_readout(name: str, attention: str) -> None:
    model = _base(name, attention)
    changed = [Sample(SAMPLES[0].prompt, [[30, 31, 32], *SAMPLES[0].readouts[1:]])]
    logits = []
    for samples in (SAMPLES[:1], changed):
        layout = build_layout(samples, BLOCKS, pad_id=0)
        logits.append(_logits(model, layout)[layout.segment_ids != 1])
    torch.testing.assert_close(logits[0], logits[1], atol=0, rtol=0)


# transformers compiles flex attention, which takes a C++ compiler: part of many machines, but not of Python.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"] if shutil.which("g++") or shutil.which("clang++") else [])
def test_flex_attention_computes_the_same(name: str) -> None:
    """Forward alone: flex attention has no backward on the CPU."""
    layout = build_layout(SAMPLES, BLOCKS, pad_id=0)
    with torch.no_grad():
        ours, theirs = (
            _one_pass_loss(_base(name, attention), layout, WEIGHTS) for attention in ("flex_attention", "eager")
        )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_proof_can_fail() -> None:
    """With a plain causal mask, readouts do see each other, and the equality is gone."""
    model = _base("llama", "eager")
    layout = build_layout(SAMPLES, BLOCKS, pad_id=0)
    leaking = Layout(**{**layout.to_dict(), "segment_ids": torch.zeros_like(layout.segment_ids)})
    assert (_logits(model, leaking) - _logits(model, layout)).abs().max() > 0.1
