"""What a simulated GPU holds less than a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from benchmarks.models import attach_rim
from rim_peft.sequence import BlockTokens, Layout, Sample, build_layout
from rim_peft.training.simulation import StepMemory, gpu_kernels, simulate_step

LLAMA: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NUM_LABELS = 3 * 4 * 8


def simulate(config: Any, *, dropout: float = 0.0, **options: Any) -> StepMemory:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = attach_rim(base, rank=8, num_blocks=4)
    model.base_model.set_dropout(dropout)
    return simulate_step(model, layout(config.vocab_size), torch.ones(3, 4), **options)


def layout(vocab_size: int) -> Layout:
    blocks = BlockTokens(begin=vocab_size, memory=vocab_size + 1, end=vocab_size + 2, block_size=2)
    return build_layout([Sample([5] * 40, [[7] * 8] * 4)] * 3, blocks, pad_id=0)


def test_the_head_holds_one_tile_of_logits() -> None:
    on_cpu, on_gpu = (simulate(LlamaConfig(**LLAMA), on_gpu=on_gpu) for on_gpu in (False, True))
    # TRL's buffer is 32,768 wide whatever the vocabulary; besides it only what is as wide as the hidden states.
    tile = NUM_LABELS * 32768 * 4
    assert tile < on_gpu.most_logits < tile + 3 * NUM_LABELS * 64 * 4 + 100 * NUM_LABELS
    # A CPU takes the tile's 8,192 columns out of it, several times.
    assert on_cpu.most_logits > tile + 2 * NUM_LABELS * 8192 * 4


def test_dropout_keeps_a_byte_for_each_number() -> None:
    without, with_dropout = (simulate(LlamaConfig(**LLAMA), dropout=p, on_gpu=True) for p in (0.0, 0.1))
    on_cpu = simulate(LlamaConfig(**LLAMA), dropout=0.1)
    # Two layers with seven linear layers each, six of them of width 64 and one of 160, before which LoRA drops out.
    inputs = 2 * 3 * (40 + 4 * (4 + 8)) * (6 * 64 + 160)
    # Each keeps a mask and what is left. What norms and MLP hand on is not kept any more: it was LoRA's input before.
    no_more = 2 * 3 * (40 + 4 * (4 + 8)) * (64 + 64 + 160)
    assert with_dropout.step - without.step == inputs * (1 + 4) - no_more * 4
    assert on_cpu.step - with_dropout.step > inputs * 3  # four bytes for a mask of one, and more logits


def test_attention_with_dropout_keeps_no_probabilities() -> None:
    config = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    found = [
        simulate(GPT2Config(**config, attn_pdrop=p), on_gpu=on_gpu).activations
        for p, on_gpu in ((0.0, True), (0.1, True), (0.1, False))
    ]
    assert found[0] == found[1] < found[2]


def test_everything_is_as_it_was_afterwards() -> None:
    from trl.kernels import chunked_logprob

    before = functional.dropout, functional.scaled_dot_product_attention, chunked_logprob._backward_tile
    with gpu_kernels():
        assert functional.dropout is not before[0]
    assert before == (functional.dropout, functional.scaled_dot_product_attention, chunked_logprob._backward_tile)
