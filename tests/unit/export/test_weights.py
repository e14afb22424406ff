"""Weights of exports: the same tokens as the plugin's on every architecture, and a head that never writes memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rim_peft import RiMConfig
from rim_peft.data.examples import Templates
from rim_peft.export.folder import Prompts
from rim_peft.export.tokens import add_memory_tokens, append_blocks, save_model, save_tokenizer
from rim_peft.export.weights import (
    adapter_state,
    add_rows,
    as_plain,
    dequantized,
    is_tied,
    memory_rows,
    merged,
    quantization_of,
)
from tests.conftest import ARCHITECTURES, EOS_ID, VOCAB_SIZE, MakeBase, MakeRim, build_base, build_rim, build_tokenizer

IDS = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
BLOCK = [IDS[0], IDS[1], IDS[1], IDS[2]]


def export(model: Any, folder: Path, ids: list[int] = IDS, **options: Any) -> Any:
    rows = memory_rows(model)
    base = merged(model)
    add_rows(base, ids, rows, **options)
    save_model(base, folder, eos_id=EOS_ID, max_shard_size="5GB")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prompts() -> torch.Tensor:
    return torch.randint(6, VOCAB_SIZE, (8, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_tied"])
def test_plain_transformers_gives_the_plugins_tokens(make_rim: MakeRim, tmp_path: Path, architecture: str) -> None:
    model = make_rim(architecture)
    asking: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompts(), **asking)[:, 12:]
    plain = export(model, tmp_path)
    assert plain.generation_config.suppress_tokens == IDS
    plain.generation_config.suppress_tokens = None  # engines may ignore it
    with_blocks = torch.cat([prompts(), torch.tensor(BLOCK * 2).expand(8, -1)], dim=1)
    assert torch.equal(plain.generate(with_blocks, **asking)[:, 20:], expected)
    assert not is_tied(plain)
    tokenizer, memory = add_memory_tokens(build_tokenizer(), num_blocks=2, block_size=2)
    append_blocks(tokenizer, memory)
    save_tokenizer(tokenizer, tmp_path)  # beside a config.json, by which transformers may choose another class
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"][-8:] == BLOCK * 2
    assert plain.get_input_embeddings().weight.shape[0] == VOCAB_SIZE + 3


def test_the_tensors_are_those_of_the_active_adapter(make_rim: MakeRim) -> None:
    model = make_rim()
    model.add_adapter("other", RiMConfig(num_blocks=2, r=2))
    model.set_adapter("other")
    state = adapter_state(model)
    (rows,) = [value for name, value in state.items() if "lora_rim_memory" in name]
    assert torch.equal(rows, memory_rows(model))
    assert {len(value) for name, value in state.items() if "lora_A" in name} == {2}


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_the_head_scores_memory_as_the_mean_of_all_tokens(make_base: MakeBase, shift: float) -> None:
    """Rows of zeros would win wherever all scores are negative, and rows of one token would tie with it."""
    base = make_base("llama_tied")
    with torch.no_grad():
        base.get_output_embeddings().weight += shift
    add_rows(base, IDS, torch.randn(3, 32))
    states = torch.randn(50, 32)
    with torch.no_grad():
        scores = base.get_output_embeddings()(states)
    known = scores[:, :VOCAB_SIZE]
    torch.testing.assert_close(scores[:, IDS], known.mean(1, keepdim=True).expand(-1, 3), rtol=1e-4, atol=1e-4)
    assert bool((scores[:, IDS] < known.max(1, keepdim=True).values).all())


def test_a_head_with_a_bias_is_guarded_too(make_base: MakeBase) -> None:
    base = make_base("llama")
    base.lm_head = torch.nn.Linear(32, VOCAB_SIZE)
    add_rows(base, IDS, torch.randn(3, 32))
    assert base.lm_head.bias[IDS[0]].item() == pytest.approx(base.lm_head.bias[:VOCAB_SIZE].mean().item(), abs=1e-6)


def test_rows_that_no_token_has_are_used_before_the_vocabulary_grows(make_rim: MakeRim, tmp_path: Path) -> None:
    """Models whose matrix is padded, such as Qwen's: the tokenizer gives ids below its size."""
    model = make_rim("llama_tied")
    rows = memory_rows(model)
    spare = [VOCAB_SIZE - 3, VOCAB_SIZE - 2, VOCAB_SIZE - 1]
    plain = export(model, tmp_path, spare)
    assert plain.get_input_embeddings().weight.shape[0] == VOCAB_SIZE
    torch.testing.assert_close(plain.get_input_embeddings().weight[spare], rows)


def test_a_tokenizer_that_is_larger_than_the_matrix(make_rim: MakeRim, tmp_path: Path) -> None:
    """As Gemma 3's: the row between, which the base never had, must not win either."""
    model = make_rim("gemma3")
    plain = export(model, tmp_path, [VOCAB_SIZE + 1, VOCAB_SIZE + 2, VOCAB_SIZE + 3])
    head = plain.get_output_embeddings().weight
    assert head.shape[0] == VOCAB_SIZE + 4
    torch.testing.assert_close(head[VOCAB_SIZE:], head[:VOCAB_SIZE].mean(0).expand(4, -1))


def test_a_head_may_stay_tied(make_rim: MakeRim, tmp_path: Path) -> None:
    model = make_rim("llama_tied")
    plain = export(model, tmp_path, keep_tied=True)
    assert is_tied(plain)
    assert plain.config.tie_word_embeddings
    assert plain.generation_config.suppress_tokens == IDS


def test_an_export_answers_greedily_whatever_its_base_does(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama")
    base.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.2, max_length=99)
    add_rows(base, IDS, torch.randn(3, 32))
    save_model(base, tmp_path, eos_id=7, max_shard_size="5GB")
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings.pop("transformers_version")
    assert settings == {
        "bos_token_id": 1,
        "eos_token_id": [EOS_ID, 7],
        "max_length": 99,
        "pad_token_id": 0,
        "suppress_tokens": IDS,
    }


def test_older_readers_find_what_they_look_for(make_rim: MakeRim, tmp_path: Path) -> None:
    model = make_rim(base=None)
    base = model.get_base_model()
    base.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    base.generation_config.eos_token_id = [7, 8]
    plain = export(model, tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5000.0, "float32")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert plain.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert plain.generation_config.eos_token_id == [7, 8, EOS_ID]


def test_older_readers_find_one_frequency_for_each_kind_of_layer(make_rim: MakeRim, tmp_path: Path) -> None:
    model = make_rim("gemma3")
    full, sliding = {"rope_type": "default", "rope_theta": 700.0}, {"rope_type": "default", "rope_theta": 50.0}
    model.get_base_model().config.rope_parameters = {"full_attention": full, "sliding_attention": sliding}
    plain = export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (700.0, 50.0)
    assert "rope_scaling" not in config
    assert plain.config.rope_parameters == {"full_attention": full, "sliding_attention": sliding}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"insertion_layer": 1}, "insertion_layer=1: a plain checkpoint has no place"),
        ({"bidirectional_blocks": True}, "bidirectional_blocks=True: a plain checkpoint has no place"),
        ({"num_blocks": 0}, "num_blocks: must be at least 1 for memory rows, got 0"),
    ],
)
def test_what_a_plain_checkpoint_cannot_express(make_rim: MakeRim, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_rows(make_rim(**options))


QUANTIZATION = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "llm_int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize(("how", "tolerance"), [("nf4", 1e-5), ("llm_int8", 0.2)])
def test_a_quantised_base_becomes_what_its_weights_stand_for(
    make_base: MakeBase, make_rim: MakeRim, tmp_path: Path, how: str, tolerance: float
) -> None:
    """nf4 in float32 is exact; int8 rounds activations too, which plain weights cannot."""
    make_base("llama", hidden_size=64, intermediate_size=128, initializer_range=0.1).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZATION[how], dtype=torch.float32)
    model = make_rim(base=base)
    assert quantization_of(model) == how
    ids = torch.tensor([[20, 30, 40, *BLOCK]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = dequantized(model)
        assert quantization_of(plain) is None
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=0, atol=tolerance)
        rows = memory_rows(plain)
        exported = merged(plain)
        add_rows(exported, IDS, rows)
        found = exported(input_ids=ids).logits[..., :VOCAB_SIZE]
    torch.testing.assert_close(found, expected, rtol=0, atol=max(tolerance, 1e-4))


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    base = build_base()
    base.lm_head.weight.data[0, 0] = 1e5  # float16 reaches to 65504
    with pytest.raises(ValueError, match=r"dtype: weights must be finite in the type .*lm_head\.weight holds inf"):
        save_model(base.half(), tmp_path, eos_id=2, max_shard_size="5GB")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_finite_is_not_exported() -> None:
    model = build_rim()
    model.base_model.memory.rows("default").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter: its weights must be finite to be exported, .*holds nan"):
        as_plain(model, build_tokenizer(), Prompts([], Templates(), 4), num_blocks=2)
