"""What a look at a run finds: problems of base, adapter, stages and rows, and what it could not look at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rim_peft.recipe import load_recipe
from rim_peft.run.at_hand import AtHand
from rim_peft.run.findings import RunFindings
from rim_peft.run.preflight import Preflight
from tests.conftest import build_base, build_tokenizer

LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "dtype": "bfloat16",
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
ROWS = [{"question": f"{n} + 1?", "steps": [f"{n}+1"], "answer": str(n + 1)} for n in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


def write_base(folder: Path, architecture: str = "llama") -> str:
    """A base's folder as ``--base`` takes it: no weights."""
    build_base(architecture).config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def write_recipe(folder: Path, *, rows: list[Any] | None = ROWS, **sections: Any) -> str:
    if rows is not None:
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stage = {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    values = {
        "output_dir": str(folder / "out"),
        "model": {"name_or_path": "owner/base"},
        "adapter": {"num_blocks": 2, "r": 4},
        "data": {"task": "gsm8k", "path": str(folder), "validation_rows": 0},
        "grounding": stage,
        "refinement": stage,
    }
    return write_values(folder, values, sections)


def write_values(folder: Path, values: dict[str, Any], sections: dict[str, Any]) -> str:
    """Write a recipe of these values, with the changes of its sections."""
    for name, changes in sections.items():
        given = values.get(name)
        values[name] = {**given, **changes} if isinstance(given, dict) and isinstance(changes, dict) else changes
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))  # which is YAML
    return str(path)


def rows_task(folder: Path) -> dict[str, Any]:
    """Rows that are read as they are."""
    return {"task": "rim_peft.tasks.logic:ProsQA", "path": str(folder / "train.jsonl")}


def look(path: str, *, base: str | None = None, row_tokens: int | None = None, device: str = "cpu") -> RunFindings:
    return Preflight(AtHand(base), row_tokens=row_tokens, device=device).check(load_recipe(path))


def test_everything_at_hand(base: str, tmp_path: Path) -> None:
    found = look(write_recipe(tmp_path, data=rows_task(tmp_path)), base=base)
    assert (found.errors, found.not_checked, found.notes) == ([], [], [])
    assert (found.architecture, found.attention) == ("LlamaForCausalLM", "sdpa")
    grounding, refinement = found.stages
    assert (grounding.stage, refinement.stage) == ("grounding", "refinement")
    # "0 + 1?" and a newline are 7 tokens, a block 4, and an answer of one digit 2.
    assert (grounding.mean_tokens, grounding.longest_tokens) == (19.0, 19)
    assert (grounding.num_rows, grounding.tokens_per_epoch, grounding.num_steps) == (8, 8 * 19, 4)
    assert refinement.batch is not None
    assert (refinement.batch.samples, refinement.batch.length) == (4, 19)
    assert found.peak == max(stage.memory.total for stage in found.stages if stage.memory is not None)


def test_a_curriculum_by_length(base: str, tmp_path: Path) -> None:
    data = rows_task(tmp_path)
    options = {"length_shares": [0.5, 0.5], "length_accuracy": 0.9, "layer_shares": [0.5, 1], "readout_step": "own"}
    assert look(write_recipe(tmp_path, data=data, grounding=options, refinement=None), base=base).errors == []
    longer = [{**row, "steps": ["0", *row["steps"]]} for row in ROWS]
    path = write_recipe(tmp_path, rows=longer, data=data, grounding=options, refinement=None)
    (error,) = look(path, base=base).errors
    assert error.startswith("grounding.length_shares: each phase must have rows to draw")


def test_a_hub_id_is_not_asked_for(tmp_path: Path) -> None:
    found = look(write_recipe(tmp_path, rows=None, data={"path": "owner/rows"}))
    assert found.errors == []
    base, rows = found.not_checked
    assert base.startswith("base, parameters, memory and tokens: owner/base is not a folder in ")
    assert "Give --base FOLDER with its config.json and tokenizer; --download fetches" in base
    assert rows.startswith("rows: owner/rows is not a folder in ")
    assert "Give data.path=FOLDER; --download fetches" in rows
    assert found.stages[0].num_steps is None


def test_a_folder_that_is_not_there(base: str, tmp_path: Path) -> None:
    data = {"path": str(tmp_path / "none")}
    found = look(write_recipe(tmp_path, rows=None, data=data, refinement=None), base=base)
    assert found.errors == []
    assert [text.partition(":")[0] for text in found.not_checked] == ["rows"]
    assert found.stages[0].memory is not None  # with rows as long as the base allows
    assert found.stages[0].stated_tokens == 512


def test_a_folder_without_the_split_is_an_error(base: str, tmp_path: Path) -> None:
    found = look(write_recipe(tmp_path, data={"train_split": "test", "validation_split": "train"}), base=base)
    assert len(found.errors) == 1
    assert "has no split 'test'" in found.errors[0]


def test_rows_without_a_base_are_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "?", "steps": [], "answer": "1"}]
    found = look(write_recipe(tmp_path, rows=rows, data=rows_task(tmp_path)))
    assert [(stage.num_rows, stage.num_steps) for stage in found.stages] == [(8, 4), (9, 6)]
    assert len(found.errors) == 1
    assert found.errors[0].startswith("grounding: 1 bad training rows. Correct the data, or omit these rows with")
    assert "row 8: steps: there are none" in found.errors[0]


def test_bad_rows_stop_a_run_or_are_noted(base: str, tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "long" * 40, "steps": ["a"], "answer": "1"}]
    data = {**rows_task(tmp_path), "max_length": 60}
    stopped = look(write_recipe(tmp_path, rows=rows, data=data, refinement=None), base=base)
    assert len(stopped.errors) == 1
    assert "too long: prompt, 2 blocks and readouts take 173 tokens, max_length is 60" in stopped.errors[0]
    data["on_bad_rows"] = "drop"
    dropped = look(write_recipe(tmp_path, rows=rows, data=data, refinement=None), base=base)
    assert dropped.errors == []
    assert "grounding: 1 bad training rows are dropped." in dropped.notes[0]
    assert (dropped.stages[0].num_rows, dropped.stages[0].num_bad_rows) == (8, 1)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"attn_implementation": "flash_attention_2"}}, "model.attn_implementation: training readouts needs"),
        ({"adapter": {"insertion_layer": 5}}, "adapter.insertion_layer: must be below the base's number of layers, 2"),
        ({"adapter": {"target_modules": ["qkv"]}}, "adapter.target_modules: must name layers of the base"),
        ({"adapter": {"init_memory": [400]}}, "adapter.init_memory: token ids must be below"),
        ({"grounding": {"block_range": [3, 4]}}, "grounding.block_range: must include the adapter's num_blocks, 2"),
        (
            {"adapter": {"bidirectional_blocks": True}, "refinement": {"compile_layers": True}},
            "refinement.compile_layers: must be False with bidirectional_blocks=True",
        ),
        ({"refinement": {"max_tokens_per_batch": 30}}, "refinement.max_tokens_per_batch: must be at least twice"),
    ],
)
def test_errors_of_base_adapter_and_stages(base: str, tmp_path: Path, sections: Any, message: str) -> None:
    found = look(write_recipe(tmp_path, data=rows_task(tmp_path), **sections), base=base)
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert found.stages[0].num_rows in (8, None)


def test_several_errors_at_once(base: str, tmp_path: Path) -> None:
    sections = {
        "model": {"attn_implementation": "flash_attention_2"},
        "grounding": {"block_range": [3, 4]},
        "data": {**rows_task(tmp_path), "max_length": 15},
    }
    found = look(write_recipe(tmp_path, **sections), base=base)
    assert [error.partition(":")[0] for error in found.errors] == [
        "model.attn_implementation",
        "grounding.block_range",
        "grounding",
        "refinement",  # whose rows have other lengths
    ]
    assert found.errors[2].startswith("grounding: all 8 training rows are bad.\n  row 0: too long: prompt, ")
    assert found.stages[0].memory is None


def test_an_adapter_that_cannot_be_attached_hides_no_error_behind_it(base: str, tmp_path: Path) -> None:
    sections: Any = {
        "adapter": {"target_modules": ["qkv"], "insertion_layer": 5},
        "grounding": {"block_range": [3, 4]},
        "refinement": {"max_tokens_per_batch": 30},
    }
    found = look(write_recipe(tmp_path, data=rows_task(tmp_path), **sections), base=base)
    assert [error.partition(":")[0] for error in found.errors] == [
        "adapter.insertion_layer",
        "grounding.block_range",
        "refinement.max_tokens_per_batch",
    ]
    assert (found.stages[0].longest_tokens, found.num_trainable, found.peak) == (31, None, None)


def test_a_base_that_cannot_branch(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    found = look(write_recipe(tmp_path), base=str(tmp_path / "base"))
    assert "which cannot hide readouts from each other" in found.errors[0]
    assert found.peak is None


def test_a_base_with_layers_before_its_output_matrix(tmp_path: Path) -> None:
    config = {"model_type": "modernbert-decoder", "vocab_size": 262, "hidden_size": 48, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "pad_token_id": 0}))
    build_tokenizer().save_pretrained(tmp_path)
    found = look(write_recipe(tmp_path, data=rows_task(tmp_path)), base=str(tmp_path))
    assert (found.errors, found.not_checked) == ([], [])
    assert "TRL's fused head does not give the logits of ModernBertDecoderForCausalLM" in found.notes[0]
    assert all(stage.memory is not None for stage in found.stages)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "vocab_size": 262}))
    build_tokenizer().save_pretrained(tmp_path)
    (error,) = look(write_recipe(tmp_path, data=rows_task(tmp_path)), base=str(tmp_path)).errors
    assert error.startswith("model: must be causal, got RobertaForCausalLM")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_base_whose_files_are_quantised(base: str, tmp_path: Path, method: str) -> None:
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    stored = {"quant_method": method, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    path = write_recipe(tmp_path, data=rows_task(tmp_path), refinement=None)
    full, found = (look(path, base=folder) for folder in (base, str(tmp_path / "base")))
    assert (found.errors, found.num_frozen) == ([], full.num_frozen)
    if method == "gptq":
        assert found.peak is None
        assert found.not_checked == [
            "grounding: memory: the base's files are quantised by gptq, which is not simulated. Run a step."
        ]
    else:
        assert full.stages[0].memory is not None
        assert found.stages[0].memory is not None
        assert found.stages[0].memory.weights < full.stages[0].memory.weights


def test_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "no-such-model"}')
    found = look(write_recipe(tmp_path, data=rows_task(tmp_path)), base=str(tmp_path / "base"))
    assert len(found.errors) == 1
    assert "no-such-model" in found.errors[0]


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    build_tokenizer(eos_token=None).save_pretrained(folder)
    found = look(write_recipe(tmp_path, data=rows_task(tmp_path), refinement=None), base=folder)
    assert "tokenizer: must have an EOS token" in found.errors[0]


def test_a_stream_has_no_lengths(base: str, tmp_path: Path) -> None:
    data = {**rows_task(tmp_path), "streaming": True}
    found = look(write_recipe(tmp_path, data=data, grounding={"max_steps": 5}, refinement=None), base=base)
    assert found.errors == []
    assert found.not_checked == ["rows: they are a stream, which is read during training (data.streaming)."]
    assert found.stages[0].num_steps == 5


def test_an_optimiser_that_is_not_known(base: str, tmp_path: Path) -> None:
    found = look(write_recipe(tmp_path, grounding={"optim": "lomo"}, refinement=None), base=base, row_tokens=40)
    assert "grounding: memory of the optimiser lomo: add it yourself." in found.not_checked
    assert found.stages[0].memory is not None


def test_rows_that_would_be_too_long_are_not_estimated(base: str, tmp_path: Path) -> None:
    data = {"path": "owner/rows", "max_length": 40}
    found = look(write_recipe(tmp_path, rows=None, data=data, refinement=None), base=base, row_tokens=41)
    assert found.errors == []
    assert "grounding: memory: rows of 41 tokens would be refused as longer than 40." in found.not_checked[-1]
    assert found.peak is None


def test_flex_attention_is_simulated_with_a_dense_mask(base: str, tmp_path: Path) -> None:
    sections: Any = {"model": {"attn_implementation": "flex_attention"}, "refinement": None}
    found = look(write_recipe(tmp_path, data=rows_task(tmp_path), **sections), base=base, device="cuda")
    assert (found.errors, found.attention) == ([], "flex_attention")
    assert found.peak is not None


@pytest.mark.parametrize(
    "option", [{"bf16": True}, {"optim": "paged_adamw_32bit"}], ids=lambda option: next(iter(option))
)
def test_a_recipe_for_a_gpu_is_looked_at_for_one(base: str, tmp_path: Path, option: Any) -> None:
    path = write_recipe(tmp_path, grounding=option, refinement=None, data=rows_task(tmp_path))
    found = Preflight(AtHand(base)).check(load_recipe(path))
    assert (found.device, found.stages[0].precision) == ("cuda", "bfloat16")


@pytest.mark.slow
def test_llama_3_2_1b_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA_3_2_1B))
    sections = {"model": {"quantization": "nf4"}, "adapter": {"num_blocks": 8, "r": 128}, "refinement": None}
    sections["data"] = {"path": "owner/rows"}
    sections["grounding"] = {"per_device_train_batch_size": 8, "optim": "paged_adamw_8bit"}
    found = look(
        write_recipe(tmp_path, rows=None, **sections), base=str(tmp_path / "base"), row_tokens=200, device="cuda"
    )
    assert found.errors == []
    assert found.num_frozen == 1_235_814_400  # as its model card says: 1.24B
    layers = 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
    assert found.num_trainable == 128 * layers + 3 * 2048
    memory = found.stages[0].memory
    assert memory is not None
    embedding = 128256 * 2048
    packed = found.num_frozen - embedding - 33 * 2048
    assert memory.weights == pytest.approx(2 * embedding + packed / 2 * (1 + 2 / 64), rel=0.01)
    assert memory.adapter == 4 * found.num_trainable
    assert memory.optimizer == pytest.approx(2 * found.num_trainable, rel=0.02)
    assert 2**30 < memory.total < 4 * 2**30
    assert any(text.startswith("tokens: folder") for text in found.not_checked)
