"""The parts of an estimate, by hand for a tiny Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig

from rim_peft import GroundingConfig, RiMConfig
from rim_peft.recipe import ModelOptions
from rim_peft.run.base import build_meta_base
from rim_peft.run.costs import BatchSize, PeakMemory, count_parameters, estimate, precision, stated_row
from rim_peft.training import BaselineConfig, BaselineTrainer, GroundingTrainer

V, H, MLP, LAYERS, R, K = 256, 64, 128, 2, 4, 3
CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=H,
    intermediate_size=MLP,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LINEAR = LAYERS * (2 * H * H + 2 * H * H // 2 + 3 * H * MLP)  # q and o, k and v, the MLP
NORMS = (2 * LAYERS + 1) * H
LORA = LAYERS * R * (2 * (H + H) + 2 * (H + H // 2) + 3 * (H + MLP))
MEMORY = 3 * H


def attach(*, quantization: Any = None, dtype: Any = "float32") -> tuple[Any, RiMConfig]:
    options = ModelOptions(name_or_path="unused", quantization=quantization, dtype=dtype)
    config = RiMConfig(num_blocks=K, r=R)
    return get_peft_model(build_meta_base(CONFIG, options, has_bf16=True), config), config


def look(
    *, kind: Any = GroundingTrainer, args: Any = GroundingConfig, device: str = "cpu", model: Any = None, **values: Any
) -> tuple[BatchSize, PeakMemory]:
    model, config = model or attach()
    options = args("unused", use_cpu=True, report_to="none", **{"gradient_checkpointing": False, **values})
    objective = kind.objective_of(options, config)
    rows = [stated_row(objective, 60, num_blocks=K)] * 4
    return estimate(model, objective, options, rows, autocast=None, device=device)


@pytest.fixture(scope="module")
def plain() -> PeakMemory:
    return look()[1]


def test_trained_and_frozen_numbers() -> None:
    model, _ = attach()
    assert count_parameters(model) == (LORA + MEMORY, 2 * V * H + LINEAR + NORMS)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_packed_numbers_count_one_each(quantization: str) -> None:
    model, _ = attach(quantization=quantization)
    assert count_parameters(model) == (LORA + MEMORY, 2 * V * H + LINEAR + NORMS)


def test_weights_adapter_and_optimiser() -> None:
    size, found = look()
    frequencies = 2 * 8 * 4  # rotary buffers
    assert size == BatchSize(samples=4, rows=4, length=60)
    assert found.weights == 4 * (2 * V * H + LINEAR + NORMS) + frequencies
    assert found.adapter == 4 * (LORA + MEMORY)
    assert found.optimizer == 2 * found.adapter
    assert found.total == found.weights + 3 * found.adapter + found.gradients + found.activations + found.logits


def test_weights_in_bfloat16_leave_the_adapter_in_float32() -> None:
    _, found = look(model=attach(dtype="bfloat16"))
    assert found.weights == 2 * (2 * V * H + LINEAR + NORMS) + 2 * 8 * 4
    assert found.adapter == 4 * (LORA + MEMORY)


def test_nf4_takes_half_a_byte_and_scales() -> None:
    _, found = look(model=attach(quantization="nf4"))
    num_linear = 7 * LAYERS
    # A byte of scale for 64 numbers, once more scaled by a float for 256 of them, and tables of 16 and 256 codes.
    scales = LINEAR // 64 + 4 * LINEAR // 64 // 256 + num_linear * 4 * (16 + 256 + 1)
    rest = 4 * (2 * V * H + NORMS) + 2 * 8 * 4
    assert found.weights == pytest.approx(LINEAR // 2 + scales + rest, rel=0.001)


def test_optimisers_differ_in_their_state_alone(plain: PeakMemory) -> None:
    paged, unknown = (look(optim=optim)[1] for optim in ("paged_adamw_8bit", "lomo"))
    assert plain.optimizer is not None
    assert paged.optimizer is not None
    # LoRA's matrices are too small here for 8-bit states: all are left in float32.
    assert paged.optimizer == plain.optimizer
    assert unknown.optimizer is None
    assert unknown.total == plain.total - plain.optimizer


def test_accumulated_gradients_are_there_all_the_time(plain: PeakMemory) -> None:
    _, twice = look(gradient_accumulation_steps=2)
    assert twice.gradients == twice.adapter > plain.gradients


def test_the_kind_of_checkpointing_is_that_of_the_stage() -> None:
    chosen, usual = (
        look(model=attach(quantization="int8"), gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)[1]
        for kind in (None, {"use_reentrant": False})
    )
    assert usual.activations > 1.2 * chosen.activations  # 8-bit layers keep their inputs all the same


def test_dropout_of_a_stage_counts(plain: PeakMemory) -> None:
    assert look(dropout=0.1)[1].activations > plain.activations


def test_packed_rows_are_those_of_the_batch() -> None:
    size, _ = look(pack_length=120)
    assert size == BatchSize(samples=4, rows=2, length=120)


def test_without_blocks_memory_rows_are_not_trained() -> None:
    _, found = look(kind=BaselineTrainer, args=BaselineConfig)
    assert found.adapter == 4 * (LORA + MEMORY)  # the blocks of pause tokens
    model, config = attach()
    config.num_blocks = 0
    _, without = look(kind=BaselineTrainer, args=BaselineConfig, model=(model, config))
    assert without.adapter == 4 * LORA


def test_mixed_precision_is_what_the_recipe_and_the_device_say() -> None:
    assert precision({}, device="cpu") is None
    assert precision({"bf16": False}, device="cuda") is None
    assert precision({"bf16": True}, device="cpu") == torch.bfloat16
    assert precision({"fp16": True}, device="cuda") == torch.float16
    if not torch.cuda.is_available():
        assert precision({}, device="cuda") == torch.bfloat16  # a GPU that is not here is one with bf16
