"""Files of an adapter that are missing, damaged or another one's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rim_peft.tuner.files import check_files
from tests.conftest import build_base, build_rim

WEIGHTS = "adapter_model.safetensors"
MEMORY = "base_model.model.model.embed_tokens.lora_rim_memory.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_rim().save_pretrained(str(tmp_path))
    return tmp_path


def load(folder: Path, base: Any = None, **options: Any) -> Any:
    return PeftModel.from_pretrained(build_base() if base is None else base, str(folder), **options)


def test_whole_files_pass(folder: Path) -> None:
    check_files(folder)
    load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
@pytest.mark.parametrize("little_memory", [False, True])
def test_a_file_that_was_cut_off(folder: Path, kept: int, little_memory: bool) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"safetensors: must be a whole safetensors file, but is damaged .* again"):
        load(folder, low_cpu_mem_usage=little_memory)
    with pytest.raises(ValueError, match="damaged or cut off"):
        check_files(folder)


def test_a_file_that_is_something_else(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(folder)


def test_files_that_are_not_there(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"must hold the adapter's weights \(adapter_model\.safetensors\)"):
        load(folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle, which can run code, and is not read"):
        load(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold an adapter \(adapter_config\.json\)"):
        check_files(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "RIM', "must be JSON, but is damaged"),
        ("[]", "names no peft_type"),
        ("{}", "names no peft_type"),
    ],
)
def test_a_configuration_that_cannot_be_read(folder: Path, text: str, message: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_files(folder)


def edit(folder: Path, **tensors: Any) -> None:
    kept = load_file(folder / WEIGHTS)
    for key in [key for key in kept if ".layers.1." in key and "q_proj.lora_A" in key]:
        replacement = tensors["change"](kept.pop(key))
        if replacement is not None:
            kept[tensors.get("name", key)] = replacement
    save_file(kept, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"change": lambda tensor: None}, r"q_proj\.lora_A\.default\.weight \(4, 32\), got none: "),
        ({"change": lambda tensor: tensor[:2].clone()}, r"q_proj\.lora_A\.default\.weight \(4, 32\), got \(2, 32\): "),
        (
            {"change": lambda tensor: tensor, "name": "base_model.model.model.layers.7.x.lora_A.weight"},
            r"lora_A\.default\.weight \(4, 32\), got none \(and 1 more\)",
        ),
    ],
)
def test_tensors_of_another_adapter(folder: Path, change: dict[str, Any], found: str) -> None:
    edit(folder, **change)
    with pytest.raises(ValueError, match=f"adapter's file: its tensors must be those of the adapter.*{found}"):
        load(folder)


def without_architecture(folder: Path) -> None:
    """Make an adapter look like one of the first versions, which did not note what their base was."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["base_architecture"], config["format_version"]
    path.write_text(json.dumps(config))


def test_an_adapter_that_does_not_say_what_its_base_was(folder: Path) -> None:
    without_architecture(folder)
    load(folder)
    with pytest.raises(ValueError, match=r"memory rows: must be \(3, 48\) for this base, got \(3, 32\)"):
        load(folder, build_base(hidden_size=48, num_attention_heads=6))
    with pytest.raises(ValueError, match=r"its tensors must be those .* not there, got \(4, 64\)"):
        load(folder, build_base(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"target_modules: must name layers of the base, got .* which matches none"):
        load(folder, build_base("gpt2"))


def test_versions_that_note_other_things_of_a_base_read_one_another(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["base_architecture"]["hidden_size"]
    config["base_architecture"]["norm"] = "rms"
    path.write_text(json.dumps(config))
    load(folder)
    with pytest.raises(ValueError, match="own base, num_hidden_layers 2, got num_hidden_layers 3"):
        load(folder, build_base(num_hidden_layers=3))
    path.write_text(json.dumps({**config, "base_architecture": "llama"}))
    with pytest.raises(ValueError, match="base_architecture: must be a mapping, got 'llama'"):
        load(folder)


@pytest.mark.parametrize(
    ("architecture", "options", "difference"),
    [
        ("llama", {"hidden_size": 48, "num_attention_heads": 6}, "hidden_size 32, got hidden_size 48"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers 2, got num_hidden_layers 3"),
        ("mistral", {}, "model_type llama, got model_type mistral"),
        ("gpt2", {"n_layer": 4}, "model_type llama, num_hidden_layers 2, got model_type gpt2, num_hidden_layers 4"),
    ],
)
def test_another_base_is_refused(folder: Path, architecture: str, options: dict[str, Any], difference: str) -> None:
    with pytest.raises(ValueError, match=f"base_architecture: must match the adapter's own base, {difference}:"):
        load(folder, build_base(architecture, **options))


@pytest.mark.parametrize("little_memory", [False, True])
def test_an_adapter_that_could_not_be_loaded_does_not_stay(folder: Path, little_memory: bool) -> None:
    whole = load_file(folder / WEIGHTS)
    edit(folder, change=lambda tensor: None)
    model = build_rim()
    with pytest.raises(ValueError, match="its tensors must be those of the adapter"):
        model.load_adapter(str(folder), "other", low_cpu_mem_usage=little_memory)
    assert list(model.peft_config) == ["default"]
    assert not any(".other" in name for name, _ in model.named_parameters())
    save_file(whole, folder / WEIGHTS)
    model.load_adapter(str(folder), "other", low_cpu_mem_usage=little_memory)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"num_blocks": 5}, "num_blocks: must be 5, as in the adapter 'default' that is attached, got 2"),
        ({"block_size": 3}, "block_size: must be 3,"),
        ({"lora_alpha": 99}, "lora_alpha: must be 99,"),
        ({"bidirectional_blocks": True}, "bidirectional_blocks: must be True,"),
    ],
)
def test_weights_do_not_replace_those_of_an_adapter_with_other_options(
    folder: Path, options: dict[str, Any], difference: str
) -> None:
    model = build_rim(**options)
    before = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match=difference):
        model.load_adapter(str(folder), "default")
    torch.testing.assert_close(get_peft_model_state_dict(model), before, atol=0, rtol=0)
    model.load_adapter(str(folder), "other")


def test_weights_replace_those_of_an_adapter_with_the_same_options(folder: Path) -> None:
    model, expected = build_rim(), load(folder)
    with torch.no_grad():
        model.base_model.memory.rows("default").normal_()
    model.load_adapter(str(folder), "default")
    torch.testing.assert_close(get_peft_model_state_dict(model), get_peft_model_state_dict(expected), atol=0, rtol=0)
    (folder / "adapter_config.json").unlink()  # weights alone, as PEFT takes them
    model.load_adapter(str(folder), "default")


@pytest.mark.parametrize("name", ["model", "layers", "weight"])
def test_an_adapter_may_be_called_as_a_part_of_the_base(folder: Path, name: str) -> None:
    model = build_rim()
    model.load_adapter(str(folder), name)
    assert list(model.peft_config) == ["default", name]


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the configuration; None takes a key out."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(
        json.dumps({name: value for name, value in config.items() if name not in changes or value is not None})
    )


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "first_memory_id", "r", "lora_alpha", "insertion_layer"])
def test_what_a_configuration_must_say_is_not_defaulted(folder: Path, name: str) -> None:
    rewrite(folder, **{name: None})
    for read in (load, check_files, lambda folder: build_base().load_adapter(str(folder))):
        with pytest.raises(ValueError, match=rf"adapter_config\.json: must hold {name}, but does not"):
            read(folder)


def test_the_first_files_say_less(folder: Path) -> None:
    without_architecture(folder)
    rewrite(folder, insertion_layer=None, bidirectional_blocks=None, use_rslora=None)
    load(folder)
    rewrite(folder, num_blocks=None)
    with pytest.raises(ValueError, match="must hold num_blocks, but does not"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 3}, "num_blocks: must be 2, as saved with the weights beside it, got 3"),
        ({"lora_alpha": 64}, "lora_alpha: must be 32, as saved with the weights beside it, got 64"),
        ({"num_blocks": 10**9}, "num_blocks: must be from 0 to 4096, got 1000000000"),
        ({"num_blocks": "2"}, "num_blocks: must be an integer of at least 0, got '2'"),
        ({"modules_to_save": 5}, r"modules_to_save: must be a list or null, got 5"),
        (
            {"rank_pattern": {"q_proj": "x"}},
            "rank_pattern: must give each name an integer .*, got 'x' for",
        ),
        ({"exclude_modules": "("}, r"exclude_modules: must be a regular expression or a list of names, got '\('"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping: is not supported by RiM"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(folder, **changes)
    for read in (load, check_files):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_ranks_beyond_the_weights_are_refused_before_memory_is_taken(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})  # without notes of the options
    for changes in ({"r": 2**16}, {"r": 4, "rank_pattern": {"q_proj": 2**16}}):
        rewrite(folder, **changes)
        with pytest.raises(ValueError, match=r"must be a rank of the adapter's weights, .* above 64, got 65536"):
            load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"peft_type": ' + "9" * 10_000 + "}", "must be JSON, but is damaged"),
        (" " * (17 << 20), "must be at most 16,777,216 bytes, got 17,825,792"),
        ('{"peft_type": {}}', "names no peft_type"),
    ],
    ids=["nested", "digits", "large", "no type"],
)
def test_configurations_are_bounded_before_they_are_parsed(folder: Path, text: str, message: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
        check_files(folder)
