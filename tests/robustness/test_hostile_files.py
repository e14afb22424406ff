"""Files that try to run code or to reach out of their folder, on every path that reads a folder of somebody else's."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rim_peft.cli.main import main
from rim_peft.comparison.sections import Comparison, MethodOptions, RowsOptions, name_of
from rim_peft.data.examples import Templates
from rim_peft.data.tokenization import tokenize_prompts
from rim_peft.run.loading import load_run
from rim_peft.run.output_folder import shared_files
from tests.conftest import build_rim, build_tokenizer, save_base
from tests.integration.test_check_and_train import write_recipe


class Payload:
    """Makes a file where it is unpickled with a pickle's full powers."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    model = build_rim()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


PICKLES = (
    "adapter_model.bin",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


def poison(folder: Path, marker: Path) -> None:
    """Put every kind of file that some library unpickles into a folder."""
    for name in PICKLES:
        torch.save({"state": Payload(marker)}, folder / name)
    np.save(folder / "rows.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    for name in ("train.pkl", "tokenizer.pkl", "best.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))


def test_the_payload_is_one(tmp_path: Path, marker: Path) -> None:
    poison(tmp_path, marker)
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert marker.exists()


def commands(capsys: pytest.CaptureFixture[str], *calls: list[str]) -> str:
    """Run commands that may fail, and return what they complain about."""
    for call in calls:
        assert main(call) in (0, 1)
    err = capsys.readouterr().err
    assert "weights_only=False" not in err
    return err


def test_pickles_in_an_adapters_folder(adapter: Path, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison(adapter, marker)
    prompts = adapter.parent / "prompts.txt"
    prompts.write_text("1 + 1?\n" * 8)
    commands(
        capsys,
        ["generate", str(adapter), "1 + 1?", "--max-new-tokens", "2"],
        ["export", str(adapter), "--output-dir", str(adapter.parent / "out"), "--prompts", str(prompts)],
    )
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".npy")) for name in shared_files(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    said = commands(
        capsys,
        ["generate", str(adapter), "1 + 1?"],
        ["export", str(adapter), "--output-dir", str(adapter.parent / "other")],
    )
    assert "adapter_model.bin is a pickle, which can run code, and is not read" in said
    assert not marker.exists()


def test_pickles_in_a_bases_folder(
    base: Path, adapter: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(base, marker)
    recipe = write_recipe(tmp_path, base)
    assert main(["check", recipe]) == 0
    (base / "model.safetensors").unlink()
    said = commands(capsys, ["check", recipe], ["train", recipe], ["generate", str(adapter), "1 + 1?"])
    assert said.count("pytorch_model.bin") >= 3
    assert not marker.exists()


@pytest.mark.slow
def test_pickles_in_an_output_folder_and_its_checkpoints(
    base: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, base, refinement={"max_steps": 1, "reset_optimizer": False})
    assert main(["train", recipe]) == 0
    out = tmp_path / "out"
    assert not any(b"os" in path.read_bytes()[:100] for path in out.glob("*.safetensors"))
    for unfinished in ([], ["refinement/final.safetensors"], ["grounding/final.safetensors"]):
        for name in [*unfinished, "adapter_config.json"]:
            (out / name).unlink(missing_ok=True)
        for folder in (out, *out.rglob("checkpoint-*"), out / "grounding", out / "refinement"):
            poison(folder, marker)
        commands(capsys, ["train", recipe, "resume=true"], ["check", recipe, "resume=true"])
        commands(capsys, ["generate", str(out), "1 + 1?", "--max-new-tokens", "2"])
        assert not marker.exists()


@pytest.mark.parametrize("name", ["train.pkl", "rows.npy", "optimizer.pt"])
def test_rows_are_no_pickles(
    base: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    poison(data, marker)
    for path in (data / name, data):
        recipe = write_recipe(tmp_path, base, data={"path": str(path)})
        assert "path: " in commands(capsys, ["check", recipe], ["train", recipe])
    assert not marker.exists()


def test_a_link_out_of_the_folder_is_neither_copied_nor_uploaded(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "token.json"
    secret.write_text('{"token": "secret"}')
    (adapter / "run.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"run\.json is a link to .*token\.json"):
        shared_files(adapter)
    assert main(["push", str(adapter), "owner/name", "--base", "owner/base"]) == 1
    assert "run.json is a link to" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"run\.json is a link to"):
        load_run(adapter)
    (adapter / "run.json").unlink()
    (adapter / "base").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match=r"base/token\.json is a link to"):
        shared_files(adapter)


def test_links_within_the_folder_and_of_the_hubs_cache_are_the_adapters_own(adapter: Path, tmp_path: Path) -> None:
    shutil.move(adapter / "README.md", adapter / "card.md")
    (adapter / "README.md").symlink_to("card.md")
    assert "README.md" in shared_files(adapter)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    (snapshot.parent.parent / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in adapter.iterdir():
        blob = snapshot.parent.parent / "blobs" / path.name
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert set(shared_files(snapshot)) == set(shared_files(adapter))


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_of_shards_reaches_nothing_else(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (tmp_path / "secret.safetensors").write_text("secret")
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": path}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    said = commands(capsys, ["check", write_recipe(tmp_path, base)])
    assert "model.name_or_path: " in said


@pytest.mark.parametrize("value", ["../../x", "/etc/x", "a/b", "..", "x\0y", "con:\\x", "\u202ex"])
def test_folders_of_a_comparison_stay_in_its_own(value: str, tmp_path: Path) -> None:
    made = tmp_path / name_of({"data.path": value})
    assert made.parent == tmp_path
    assert made.name not in ("", ".", "..")
    with pytest.raises(ValueError, match="methods: a name must consist of letters"):
        Comparison(
            output_dir="out",
            recipe="recipe.yaml",
            reference=value,
            methods={value: MethodOptions()},
            test=RowsOptions("test"),
            selection=RowsOptions("validation"),
        )


TEMPLATES: dict[str, Callable[[Path], str]] = {
    "import": lambda marker: "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": lambda marker: f"{{{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}}}",
    "builtins": lambda marker: f"{{{{ raise_exception.__globals__['__builtins__']['open']('{marker}', 'w') }}}}",
    "mutate": lambda marker: "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_chat_templates_stay_in_their_sandbox(
    adapter: Path, base: Path, marker: Path, capsys: pytest.CaptureFixture[str], template: Callable[[Path], str]
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template(marker)
    with pytest.raises(Exception, match=r"(?i)unsafe|undefined|not allowed|template"):
        tokenize_prompts([[{"role": "user", "content": "1 + 1?"}]], tokenizer, Templates())
    assert not marker.exists()
