import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from rim_peft import RiMConfig
from rim_peft.sequence.layout import BlockTokens


def test_defaults_are_the_papers() -> None:
    config = RiMConfig()
    assert (config.num_blocks, config.block_size, config.r, config.lora_alpha) == (8, 2, 128, 32)
    assert (config.target_modules, config.task_type, config.init_memory) == ("all-linear", "CAUSAL_LM", "vocabulary")
    assert config.peft_type == "RIM"
    assert not hasattr(config, "num_virtual_tokens")  # TRL slices logits by it


def test_block_tokens_follow_the_vocabulary() -> None:
    config = RiMConfig(block_size=3, first_memory_id=100)
    assert config.block_tokens == BlockTokens(begin=100, memory=101, end=102, block_size=3)
    with pytest.raises(ValueError, match=r"first_memory_id: must be known .* got None\. Attach"):
        RiMConfig().block_tokens  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": -1}, "num_blocks: must be an integer of at least 0, got -1"),
        ({"num_blocks": 2.0}, "num_blocks: must be an integer of at least 0, got 2.0"),
        ({"num_blocks": True}, "num_blocks: must be an integer of at least 0, got True"),
        ({"block_size": 0}, "block_size: must be an integer of at least 1, got 0"),
        ({"insertion_layer": -1}, "insertion_layer: must be an integer of at least 0, got -1"),
        ({"insertion_layer": True}, "insertion_layer: must be an integer of at least 0, got True"),
        ({"bidirectional_blocks": 1}, "bidirectional_blocks: must be True or False, got 1"),
        ({"r": -4}, "r: must be an integer of at least 0, got -4"),
        ({"lora_alpha": 0}, "lora_alpha: must be an integer of at least 1, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: must be a number in \[0, 1\), got 1.0"),
        ({"first_memory_id": 0}, "first_memory_id: must be an integer of at least 1, got 0"),
        ({"init_memory": "mean"}, "init_memory: must be 'vocabulary' or 'random' or a list of token ids"),
        ({"init_memory": []}, r"init_memory: .* got \[\]"),
        ({"init_memory": [3, -1]}, r"init_memory: .* got \[3, -1\]"),
        ({"init_memory": None}, "init_memory: .* got None"),
        ({"task_type": "SEQ_CLS"}, "task_type: must be 'CAUSAL_LM', got 'SEQ_CLS'"),
        ({"task_type": None}, "task_type: must be 'CAUSAL_LM', got None"),
        ({"bias": "all"}, "bias: must be 'none', got 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .* got 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: .* got 'olora'"),
        ({"r": 0, "rank_pattern": {"q_proj": 4}}, "r: must be at least 1 with rank_pattern"),
        ({"layer_replication": [(0, 2)]}, "layer_replication: is not supported by RiM"),
        ({"megatron_config": {"a": 1}}, "megatron_config: is not supported by RiM"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: is not supported by RiM"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: is not supported by RiM"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RiMConfig(**options)


def test_options_of_lora_are_taken() -> None:
    config = RiMConfig(r=0, lora_dropout=0.1, use_rslora=True, init_memory=(4, 5))  # type: ignore[arg-type]
    assert config.use_rslora
    assert config.init_memory == [4, 5]


def test_json_round_trip(tmp_path: Path) -> None:
    config = RiMConfig(num_blocks=3, block_size=4, init_memory=[7, 8], first_memory_id=50)
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "RIM"
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, RiMConfig)
    assert (loaded.num_blocks, loaded.block_size, loaded.init_memory, loaded.first_memory_id) == (3, 4, [7, 8], 50)


def test_files_of_a_later_format_are_refused(tmp_path: Path) -> None:
    RiMConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["format_version"] == 1
    # A later version has options that this one does not know, and other values for those that it knows.
    path.write_text(json.dumps({**saved, "format_version": 2, "init_memory": "learned", "gates": 4}))
    with (
        pytest.warns(UserWarning, match="gates"),
        pytest.raises(
            ValueError, match=r"format_version: must be at most 1, got 2: .*later rim-peft .* Update rim-peft"
        ),
    ):
        PeftConfig.from_pretrained(str(tmp_path))
    path.write_text(json.dumps({key: value for key, value in saved.items() if key != "format_version"}))
    assert PeftConfig.from_pretrained(str(tmp_path)).format_version == 1


@pytest.mark.parametrize("value", [0, "1", None, True])
def test_a_format_is_a_number(value: object) -> None:
    with pytest.raises(ValueError, match="format_version: must be an integer of at least 1"):
        RiMConfig(format_version=value)  # type: ignore[arg-type]


def test_options_that_this_version_does_not_know_are_left_out_with_a_warning(tmp_path: Path) -> None:
    RiMConfig(num_blocks=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gates": 4}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['gates'\] for class RiMConfig"):
        config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, RiMConfig)
    assert config.num_blocks == 3
    assert not hasattr(config, "gates")


@pytest.mark.parametrize("pattern", ["(([a-z0-9._]+)+)+X", "(a|a)+X", "(.*a){20}", ".*.*.*.*.*.*.*X"])
def test_expressions_that_could_match_for_ever_are_refused(pattern: str) -> None:
    for options in ({"target_modules": pattern}, {"exclude_modules": pattern}, {"rank_pattern": {pattern: 4}}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: must be a regular expression without repeated"):
            RiMConfig(**options)


def test_usual_expressions_are_taken() -> None:
    for pattern in (r".*\.layers\.(\d+)\..*\.(q|v)_proj", "^(?:(?!.*(vision|audio)).)*\\.q_proj$", "(model\\.)?q_proj"):
        assert RiMConfig(target_modules=pattern).target_modules == pattern
