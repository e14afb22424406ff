"""bitsandbytes bases, which run on the CPU: rows and LoRA train in float32 on frozen 4- and 8-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rim_peft.comparison.measuring import count_base
from rim_peft.export.weights import on_stored_base
from rim_peft.tuner.bases import keep_unpacked
from tests.conftest import VOCAB_SIZE, MakeBase, MakeRim

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # nf4 needs 64 or more
PROMPT = torch.tensor([[20, 30, 40, 50]])
MEMORY = torch.tensor([[20, 30, VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE + 2, 60, 70]])
LABELS = torch.tensor([[-100, -100, -100, -100, -100, -100, 60, 70]])
QUANTIZATION = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture
def base_dir(make_base: MakeBase, tmp_path: Path) -> str:
    folder = str(tmp_path / "base")
    make_base("llama", **WIDE).save_pretrained(folder)
    return folder


def load(base_dir: str, how: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=QUANTIZATION[how], dtype=torch.float32)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_base_has_as_many_parameters_whatever_its_types(make_rim: MakeRim, base_dir: str, how: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    assert count_base(make_rim(base=load(base_dir, how), fresh=True)) == plain.num_parameters()


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_training_saving_and_generating_on_a_quantized_base(
    make_rim: MakeRim, base_dir: str, tmp_path: Path, how: str
) -> None:
    base = prepare_model_for_kbit_training(load(base_dir, how))
    model = make_rim(base=base, fresh=True).train()
    rows = model.base_model.memory.rows("default")
    start = rows.detach().clone()
    vocabulary = base.get_input_embeddings().weight.float()
    assert rows.dtype == torch.float32
    assert ((start.mean(0) - vocabulary.mean(0)).abs() / vocabulary.std(0)).max() < 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=MEMORY, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(rows, start)

    adapter_dir = str(tmp_path / "adapter")
    model.eval().save_pretrained(adapter_dir)
    expected = model.generate(PROMPT, max_new_tokens=4)
    routes: tuple[Any, ...] = (
        PeftModel.from_pretrained(load(base_dir, how), adapter_dir),
        AutoPeftModelForCausalLM.from_pretrained(
            adapter_dir, quantization_config=QUANTIZATION[how], dtype=torch.float32
        ),
        AutoModelForCausalLM.from_pretrained(adapter_dir, quantization_config=QUANTIZATION[how], dtype=torch.float32),
    )
    for loaded in routes:
        loaded.eval()
        torch.testing.assert_close(loaded.get_input_embeddings().rows("default"), rows, atol=0, rtol=0)
        torch.testing.assert_close(loaded.generate(PROMPT, max_new_tokens=4), expected)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_disabled_adapter_equals_the_quantized_base(make_rim: MakeRim, base_dir: str, how: str) -> None:
    base = load(base_dir, how).eval()
    keep_unpacked(base)  # the same kernel on both sides
    with torch.no_grad():
        expected = base(input_ids=PROMPT).logits
        model = make_rim(base=load(base_dir, how))
        assert not torch.allclose(model(input_ids=PROMPT).logits, expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=PROMPT).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_merging_into_a_quantized_base(make_rim: MakeRim, base_dir: str, how: str) -> None:
    model = make_rim(base=load(base_dir, how))
    with torch.no_grad():
        adapted = model(input_ids=PROMPT).logits
        with model.disable_adapter():
            plain = model(input_ids=PROMPT).logits
        merged = model.merge_and_unload()
        found = merged(input_ids=PROMPT).logits
    assert merged.get_input_embeddings().weight.shape == (VOCAB_SIZE, 64)
    # LoRA is added to the dequantised weights, which are quantised anew: near to the adapter, and nearer than the base.
    near, far = (torch.cosine_similarity(adapted.flatten(), other.flatten(), dim=0) for other in (found, plain))
    assert near > 0.9
    assert near > far


def test_an_adapter_moves_to_the_base_as_it_is_stored(make_rim: MakeRim, base_dir: str) -> None:
    """As an engine loads it: neither with quantised weights nor with those rounded to a smaller type."""
    rounded = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    for base in (load(base_dir, "nf4"), rounded):
        model = make_rim(base=base)
        before = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
        moved: Any = on_stored_base(model)
        stored = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        layer = moved.get_base_model().model.layers[0].self_attn.q_proj
        assert torch.equal(layer.base_layer.weight, stored.model.layers[0].self_attn.q_proj.weight)
        after = get_peft_model_state_dict(moved)
        assert before.keys() == after.keys()
        assert all(torch.equal(value.float(), after[name].float()) for name, value in before.items())
        assert on_stored_base(moved) is moved


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_answering_does_not_change_the_next_gradients(make_rim: MakeRim, base_dir: str, how: str) -> None:
    """On some CPUs bitsandbytes repacks nf4 weights when it first answers, which must not reach training."""
    model = make_rim(base=load(base_dir, how)).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=MEMORY, labels=LABELS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    model.generate(PROMPT, max_new_tokens=2)
    model.train()
    torch.testing.assert_close(gradients(), before)


def test_bfloat16_base_trains_rows_in_float32(make_rim: MakeRim, make_base: MakeBase) -> None:
    model = make_rim(base=make_base().to(torch.bfloat16), fresh=True).train()
    model(input_ids=MEMORY, labels=LABELS).loss.backward()
    rows = model.base_model.memory.rows("default")
    assert rows.dtype == torch.float32
    assert rows.grad is not None
    assert rows.grad.dtype == torch.float32
    assert bool((rows.grad.abs().sum(1) > 0).all())
