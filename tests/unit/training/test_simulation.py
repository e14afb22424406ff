"""Simulated memory against what a real step of the real trainer allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Trainer, TrainingArguments

from benchmarks.measure import peak_memory, tensor_bytes
from benchmarks.models import attach_rim
from benchmarks.steps import RowSizes, readout_step
from rim_peft.recipe import ModelOptions
from rim_peft.run.base import build_meta_base, load_base
from rim_peft.training.simulation import optimizer_bytes, simulate_step

BASES: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    ),
    "gpt2": GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gemma3": Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
SIZES = RowSizes(batch=3, prompt=40)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_what_a_real_step_allocates(base: str, checkpointing: bool, attention: str) -> None:
    def build() -> Any:
        return AutoModelForCausalLM.from_config(BASES[base], dtype=torch.float32, attn_implementation=attention)

    step = readout_step(attach_rim(build(), rank=8, num_blocks=4), "stage 2", SIZES, checkpointing=checkpointing)
    step()  # allocates the optimiser's state
    measured = peak_memory(step.forward_and_backward)
    layout, weights = step.rows()
    with torch.device("meta"):
        base_model = build()
    model = attach_rim(base_model, rank=8, num_blocks=4)
    simulated = simulate_step(model, layout, weights, checkpointing=checkpointing)
    assert simulated.step == pytest.approx(measured, rel=0.02)
    assert simulated.logits > 0


def test_only_logits_grow_with_the_vocabulary() -> None:
    found = {}
    for size in (4096, 16384):
        config = LlamaConfig(**{**BASES["llama"].to_dict(), "vocab_size": size})
        step = readout_step(
            attach_rim(AutoModelForCausalLM.from_config(config), rank=8, num_blocks=4), "stage 1", SIZES
        )
        layout, weights = step.rows()
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        found[size] = simulate_step(attach_rim(base, rank=8, num_blocks=4), layout, weights)
    small, large = found.values()
    assert large.logits > 2 * small.logits  # TRL's head works in tiles of 32k, with room of their own
    assert large.activations == small.activations


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantised_bases_are_those_of_a_real_step(quantization: Any, checkpointing: bool, tmp_path: Path) -> None:
    options = ModelOptions(name_or_path=str(tmp_path), quantization=quantization)
    config = LlamaConfig(**{**BASES["llama"].to_dict(), "hidden_size": 128, "intermediate_size": 320})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    real = load_base(str(tmp_path), options)
    real_model = attach_rim(real, rank=8, num_blocks=4)
    step = readout_step(real_model, "stage 2", SIZES, checkpointing=checkpointing)
    step()
    measured = peak_memory(step.forward_and_backward)
    layout, weights = step.rows()
    base = build_meta_base(config, options)
    simulated = simulate_step(attach_rim(base, rank=8, num_blocks=4), layout, weights, checkpointing=checkpointing)
    assert simulated.step == pytest.approx(measured, rel=0.02)
    held = [*real_model.parameters(), *real_model.buffers()]
    for layer in real_model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            held.append(layer.state.SCB)
    # A table of codes that all layers share is one in the real model.
    assert simulated.weights + simulated.adapter == pytest.approx(tensor_bytes(held), rel=0.05)


def test_gradients_of_batches_before_are_held_all_through_a_step() -> None:
    step = readout_step(
        attach_rim(AutoModelForCausalLM.from_config(BASES["llama"], dtype=torch.float32), rank=8, num_blocks=4),
        "stage 2",
        SIZES,
        checkpointing=True,
    )
    step.trainer.training_step(step.model, dict(step.batch))  # whose gradients stay
    gradients = sum(tensor_bytes([p.grad]) for p in step.model.parameters() if p.grad is not None)
    measured = peak_memory(lambda: step.trainer.training_step(step.model, dict(step.batch)))
    layout, weights = step.rows()

    def simulate(*, accumulates: bool) -> Any:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(BASES["llama"], dtype=torch.float32)
        model = attach_rim(base, rank=8, num_blocks=4)
        return simulate_step(model, layout, weights, checkpointing=True, accumulates=accumulates)

    later, first = simulate(accumulates=True), simulate(accumulates=False)
    assert gradients == later.adapter
    assert later.gradients == gradients > first.gradients
    assert later.step == pytest.approx(gradients + measured, rel=0.02)


SHAPES = [(64, 128), (8, 16), (40,)]  # the first is large enough for 8-bit states


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("sgd", None),
        ("sgd", "momentum=0.9"),
        ("adagrad", None),
        ("rmsprop", None),
        ("rmsprop", "momentum=0.9"),
        ("adafactor", None),
        ("paged_adamw_32bit", None),
        ("paged_adamw_8bit", None),
        ("adamw_8bit", None),
        ("lion_32bit", None),
        ("paged_lion_8bit", None),
        ("ademamix", None),
        ("ademamix_8bit", None),
    ],
)
def test_it_is_what_the_optimiser_keeps(optim: str, options: str | None) -> None:
    GlobalOptimManager.get_instance().initialize()  # it knows parameters of other tests by where they lay in memory
    args = TrainingArguments("unused", optim=optim, optim_args=options, use_cpu=True, report_to="none")
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = optimizer_class(parameters, **kwargs)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = ("qmap1", "qmap2", "step")  # shared by all tensors, and counters
    kept = 0
    for state in optimizer.state.values():
        kept += sum(value.nbytes for name, value in state.items() if torch.is_tensor(value) and name not in tables)
    momentum = options is not None
    # Adafactor keeps a scalar for each tensor besides.
    assert optimizer_bytes(optim, SHAPES, has_momentum=momentum) == pytest.approx(kept, abs=4 * len(SHAPES))


def test_an_optimiser_that_is_not_known() -> None:
    assert optimizer_bytes("galore_adamw", SHAPES) is None


def test_by_hand() -> None:
    assert optimizer_bytes("paged_adamw_8bit", [(64, 128), (10,)]) == 2 * (8192 + 4 * 32) + 2 * 4 * 10
