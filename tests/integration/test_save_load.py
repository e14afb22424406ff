"""An adapter is saved and comes back the same by every route that loads one."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

from rim_peft import RiMConfig
from tests.conftest import VOCAB_SIZE, MakeBase, MakeRim, switches_natively

PROMPT = torch.tensor([[20, 30, 40, 50]])
MEMORY = torch.tensor([[20, 30, VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE + 2]])
WEIGHTS = "adapter_model.safetensors"


def logits(model: Any, ids: Tensor = MEMORY) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def rows(model: Any, name: str = "default") -> Tensor:
    result: Tensor = model.get_input_embeddings().rows(name).detach()
    return result


@pytest.fixture
def saved(make_base: MakeBase, make_rim: MakeRim, tmp_path: Path) -> Callable[..., tuple[Any, str, str]]:
    """Save a base and an adapter on it: (model, folder of the base, folder of the adapter)."""

    def save(architecture: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, str, str]:
        base_dir, adapter_dir = str(tmp_path / "base"), str(tmp_path / "adapter")
        make_base(architecture).to(dtype).save_pretrained(base_dir)
        model = make_rim(architecture, base=AutoModelForCausalLM.from_pretrained(base_dir).eval(), **options)
        model.save_pretrained(adapter_dir)
        return model, base_dir, adapter_dir

    return save


def by_peft(base_dir: str, adapter_dir: str) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir)


def by_peft_with_little_memory(base_dir: str, adapter_dir: str) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir, low_cpu_mem_usage=True
    )


def by_auto_peft(base_dir: str, adapter_dir: str) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(adapter_dir)


def by_transformers(base_dir: str, adapter_dir: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(adapter_dir)


ROUTES = [by_peft, by_peft_with_little_memory, by_auto_peft, by_transformers]


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_every_route_gives_the_same_model(saved: Any, architecture: str, load: Callable[..., Any]) -> None:
    model, *folders = saved(architecture)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = load(*folders)
    torch.testing.assert_close(rows(loaded), rows(model), atol=0, rtol=0)
    torch.testing.assert_close(logits(loaded), logits(model))
    expected = model.generate(PROMPT, max_new_tokens=6)
    torch.testing.assert_close(loaded.generate(PROMPT, max_new_tokens=6), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("load", ROUTES)
def test_rows_stay_float32_on_a_bfloat16_base(saved: Any, load: Callable[..., Any]) -> None:
    model, base_dir, adapter_dir = saved("llama", torch.bfloat16)
    assert (
        load_file(f"{adapter_dir}/{WEIGHTS}")["base_model.model.model.embed_tokens.lora_rim_memory.weight"].dtype
        == torch.float32
    )
    loaded = load(base_dir, adapter_dir)
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    assert rows(loaded).dtype == torch.float32
    torch.testing.assert_close(rows(loaded), rows(model), atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2"])
def test_the_file_holds_rows_and_lora_only(saved: Any, architecture: str) -> None:
    model, _, adapter_dir = saved(architecture)
    tensors = load_file(f"{adapter_dir}/{WEIGHTS}")
    memory = [key for key in tensors if "lora_rim_memory" in key]
    assert [tensors[key].shape for key in memory] == [(3, 32)]
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors if key not in memory)
    trainable = model.get_nb_trainable_parameters()[0]
    assert sum(tensor.numel() for tensor in tensors.values()) == trainable
    header = 200 * len(tensors)
    assert (Path(adapter_dir) / WEIGHTS).stat().st_size < 4 * trainable + header


def test_memory_alone_is_a_file_of_three_rows(saved: Any) -> None:
    model, base_dir, adapter_dir = saved(r=0)
    assert [tensor.shape for tensor in load_file(f"{adapter_dir}/{WEIGHTS}").values()] == [(3, 32)]
    for load in ROUTES:
        torch.testing.assert_close(logits(load(base_dir, adapter_dir)), logits(model))


def test_doras_magnitudes_load_by_every_route_and_under_pefts_older_name(saved: Any) -> None:
    model, base_dir, adapter_dir = saved(use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.5)
    model.save_pretrained(adapter_dir)
    for load in ROUTES:
        torch.testing.assert_close(logits(load(base_dir, adapter_dir)), logits(model))
    tensors = load_file(f"{adapter_dir}/{WEIGHTS}")
    older = {key.replace("magnitude_vector.weight", "magnitude_vector"): value for key, value in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, f"{adapter_dir}/{WEIGHTS}")
    torch.testing.assert_close(logits(by_peft(base_dir, adapter_dir)), logits(model))


def test_training_goes_on_after_loading(saved: Any) -> None:
    _, base_dir, adapter_dir = saved()
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir, is_trainable=True
    )
    assert rows(model).shape == (3, 32)
    model(input_ids=MEMORY).logits.sum().backward()
    assert bool(model.base_model.memory.rows("default").grad.abs().sum() > 0)
    before = rows(model).clone()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(adapter_dir)
    again = rows(by_peft(base_dir, adapter_dir))
    torch.testing.assert_close(again, rows(model), atol=0, rtol=0)
    assert not torch.equal(again, before)


def by_peft_with_more(base_dir: str, adapter_dir: str, others: dict[str, str]) -> Any:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir)
    for name, folder in others.items():
        model.load_adapter(folder, name)
    return model


def by_transformers_with_more(base_dir: str, adapter_dir: str, others: dict[str, str]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(adapter_dir)
    for name, folder in others.items():
        model.load_adapter(folder, name)
    return model


@pytest.mark.parametrize("load", [by_peft_with_more, pytest.param(by_transformers_with_more, marks=switches_natively)])
def test_several_adapters_with_their_own_blocks(saved: Any, load: Callable[..., Any]) -> None:
    model, base_dir, adapter_dir = saved()
    model.add_adapter("other", RiMConfig(num_blocks=5, block_size=3, r=2))
    first = model.generate(PROMPT, max_new_tokens=6)
    model.set_adapter("other")
    second = model.generate(PROMPT, max_new_tokens=6)
    model.save_pretrained(adapter_dir)
    loaded = load(base_dir, adapter_dir, {"other": f"{adapter_dir}/other"})
    for name, expected in (("other", second), ("default", first)):
        loaded.set_adapter(name)
        loaded.eval()
        torch.testing.assert_close(rows(loaded, name), rows(model, name), atol=0, rtol=0)
        torch.testing.assert_close(loaded.generate(PROMPT, max_new_tokens=6), expected)


@switches_natively
def test_a_model_loaded_by_transformers_switches_off_and_saves(saved: Any, make_base: MakeBase, tmp_path: Path) -> None:
    model, base_dir, adapter_dir = saved()
    native: Any = AutoModelForCausalLM.from_pretrained(adapter_dir)
    native.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(by_peft(base_dir, str(tmp_path / "again"))), logits(model))
    native.disable_adapters()
    torch.testing.assert_close(logits(native, PROMPT), logits(make_base(), PROMPT), atol=0, rtol=0)
    torch.testing.assert_close(
        native.generate(PROMPT, max_new_tokens=5), make_base().generate(PROMPT, max_new_tokens=5)
    )


def test_a_pipeline_loads_and_runs_an_adapter(saved: Any, tokenizer: Any) -> None:
    model, _, adapter_dir = saved()
    tokenizer.save_pretrained(adapter_dir)
    generator = pipeline("text-generation", model=adapter_dir, tokenizer=tokenizer)
    result = generator("Who?", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    output = model.generate(**tokenizer("Who?", return_tensors="pt"), max_new_tokens=6)
    assert result == tokenizer.decode(output[0, 4:], skip_special_tokens=True)
    torch.testing.assert_close(
        rows(AutoPeftModelForCausalLM.from_pretrained(adapter_dir)), rows(model)
    )  # with tokenizer


def test_a_fresh_process_needs_the_import_alone(saved: Any) -> None:
    model, _, adapter_dir = saved()
    code = (
        "import rim_peft, sys, torch; from peft import AutoPeftModelForCausalLM; "
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(model.generate(torch.tensor([[20, 30, 40, 50]]), max_new_tokens=6).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code, adapter_dir], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == str(model.generate(PROMPT, max_new_tokens=6).tolist())


@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize("size", [VOCAB_SIZE - 2, VOCAB_SIZE + 10])
def test_a_base_with_another_vocabulary_is_refused(
    saved: Any, make_base: MakeBase, load: Callable[..., Any], size: int
) -> None:
    _, base_dir, adapter_dir = saved()
    make_base(vocab_size=size).save_pretrained(base_dir)
    with pytest.raises(ValueError, match=f"first_memory_id: must be the number of rows .*, {size}, got {VOCAB_SIZE}"):
        load(base_dir, adapter_dir)


def test_a_base_of_another_width_is_refused(saved: Any, make_base: MakeBase) -> None:
    _, base_dir, adapter_dir = saved()
    make_base(hidden_size=48, num_attention_heads=6).save_pretrained(base_dir)
    for load in ROUTES:
        with pytest.raises(
            ValueError, match=r"base_architecture: .* hidden_size 32, got hidden_size 48: .*Load it onto"
        ):
            load(base_dir, adapter_dir)


def test_a_file_without_rows_is_refused(saved: Any) -> None:
    _, base_dir, adapter_dir = saved()
    tensors = load_file(f"{adapter_dir}/{WEIGHTS}")
    save_file({key: value for key, value in tensors.items() if "rim" not in key}, f"{adapter_dir}/{WEIGHTS}")
    with pytest.raises(
        ValueError, match=r"memory rows: must be \(3, 32\) for this base, got none in the adapter's file"
    ):
        by_peft(base_dir, adapter_dir)


def test_a_tied_head_stays_tied_after_loading(saved: Any) -> None:
    model, _, adapter_dir = saved("llama_tied")
    for load in (by_auto_peft, by_transformers):
        loaded = load("", adapter_dir)
        head = loaded.get_output_embeddings().weight
        assert head.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
        loaded.tie_weights()
        torch.testing.assert_close(logits(loaded), logits(model))
