"""The base of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rim_peft.data.examples import ROW_ERROR, Templates
from rim_peft.recipe import ModelOptions
from rim_peft.run import base as base_module
from rim_peft.run.base import build_meta_base, load_base
from rim_peft.run.built_base import build_base
from rim_peft.run.tokenizer import load_tokenizer
from tests.conftest import build_base as tiny_base

CONFIG = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 128}
ROWS: list[dict[str, Any]] = [
    {"question": "How many apples are apples?", "steps": ["apples=apples"], "answer": "apples", ROW_ERROR: None},
    {"question": [{"role": "user", "content": "Many apples?"}], "steps": None, "answer": "7", ROW_ERROR: None},
    {"question": None, "steps": None, "answer": None, ROW_ERROR: "answer: is missing"},
]


def build(folder: Path, *, seed: int = 0, **changes: Any) -> None:
    build_base({**CONFIG, **changes}, ROWS, templates=Templates(), seed=seed, folder=folder)


def test_a_built_base_is_set_by_its_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / name, seed=seed)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    assert not list(tmp_path.glob("*.partial"))


def test_its_tokenizer_knows_the_rows_and_writes_any_text(tmp_path: Path) -> None:
    build(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = "Zwölf Äpfel cost 7 €.\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("apples").input_ids) < len("apples")
    assert len(tokenizer) <= 300
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.config.vocab_size: must be at least 258.*got 100"):
        build(tmp_path / "base", vocab_size=100)


def test_eos_pads_where_there_is_no_padding_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), ModelOptions(name_or_path="elsewhere"))
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert len(loaded) == len(tokenizer)


def test_a_tokenizer_needs_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: must have an EOS token"):
        load_tokenizer(str(tmp_path), ModelOptions(name_or_path="elsewhere"))


def test_types_and_attention_of_the_base(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path)
    options = ModelOptions(name_or_path=str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    base = load_base(str(tmp_path), options)
    assert base.dtype == torch.bfloat16
    assert base.config._attn_implementation == "eager"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_bases(tmp_path: Path, quantization: Any) -> None:
    tiny_base(hidden_size=64).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), ModelOptions(name_or_path=str(tmp_path), quantization=quantization))
    config = base.config.quantization_config
    if quantization == "nf4":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    else:
        assert config.load_in_8bit
    layer = base.model.layers[0].self_attn.q_proj.weight
    assert layer.dtype in (torch.uint8, torch.int8)


def test_quantisation_without_bitsandbytes_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"model.quantization: needs bitsandbytes.*got 'nf4'. pip install"):
        load_base(str(tmp_path), ModelOptions(name_or_path=str(tmp_path), quantization="nf4"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"quantization": "nf4"}, {"quantization": "int8"}])
def test_a_base_without_weights_has_the_same_layers(architecture: str, changes: Any, tmp_path: Path) -> None:
    tiny_base(architecture, **({"hidden_size": 64} if architecture == "llama" else {"n_embd": 64})).save_pretrained(
        tmp_path
    )
    options = ModelOptions(name_or_path=str(tmp_path), **changes)
    real = load_base(str(tmp_path), options)
    outline = build_meta_base(AutoConfig.from_pretrained(tmp_path), options)
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    assert [(name, type(module)) for name, module in outline.named_modules()] == [
        (name, type(module)) for name, module in real.named_modules()
    ]
    kept = {name: p for name, p in real.named_parameters() if p.dtype not in (torch.uint8, torch.int8)}
    found = dict(outline.named_parameters())
    assert {name: (found[name].shape, found[name].dtype) for name in kept} == {
        name: (parameter.shape, parameter.dtype) for name, parameter in kept.items()
    }
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(outline, flag, False) == getattr(real, flag, False)


def test_a_base_that_is_stored_quantised_keeps_its_layers(tmp_path: Path) -> None:
    tiny_base("llama", hidden_size=64).save_pretrained(tmp_path / "full")
    options = ModelOptions(name_or_path=str(tmp_path / "full"), quantization="nf4")
    load_base(str(tmp_path / "full"), options).save_pretrained(tmp_path / "nf4")
    options = ModelOptions(name_or_path=str(tmp_path / "nf4"))
    real = load_base(str(tmp_path / "nf4"), options)
    outline = build_meta_base(AutoConfig.from_pretrained(tmp_path / "nf4"), options)
    assert real.is_loaded_in_4bit
    assert outline.is_loaded_in_4bit
    assert [(name, type(module)) for name, module in outline.named_modules()] == [
        (name, type(module)) for name, module in real.named_modules()
    ]
