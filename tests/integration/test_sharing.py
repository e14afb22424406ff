"""What lies beside an adapter after ``save_pretrained``, and what users see who load it in other ways."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from rim_peft import RiMConfig
from rim_peft.tuner.card import TAGS
from rim_peft.tuner.sharing import attach_papers, upload
from tests.conftest import build_base, build_rim, save_base
from tests.integration.hub_server import TOKEN, serve
from tests.integration.hub_state import Hub


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a base with its tokenizer and of an adapter on it."""
    save_base(tmp_path / "base")
    model = build_rim()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "base", tmp_path / "adapter"


def test_a_saved_adapter_has_a_card_whose_code_runs(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = saved
    text = (adapter / "README.md").read_text()
    assert ModelCard(text).data.tags == list(TAGS)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.startswith("import rim_peft")
    assert f'"{base}"' in code
    monkeypatch.chdir(adapter.parent)
    exec(code, {})  # noqa: S102 - what a reader of the card would do
    assert capsys.readouterr().out.endswith("\n")


def test_a_card_that_was_written_by_hand_stays(saved: tuple[Path, Path]) -> None:
    _, adapter = saved
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    build_rim().save_pretrained(str(adapter), save_embedding_layers=False)
    card = ModelCard((adapter / "README.md").read_text())
    assert (card.data.license, card.data.tags, card.text.strip()) == ("mit", list(TAGS), "# Mine")


def test_the_cards_of_other_adapters_are_pefts(tmp_path: Path) -> None:
    model = get_peft_model(build_base(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "Framework versions" in text
    assert "rim" not in ModelCard(text).data.tags
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SafetensorError, match=r"^Error while deserializing header"):  # as PEFT says it
        PeftModel.from_pretrained(build_base(), str(tmp_path))


def test_transformers_own_loading_says_so_too_of_a_file_that_was_cut_off(saved: tuple[Path, Path]) -> None:
    weights = saved[1] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: must be a whole safetensors file"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_papers_belong_to_the_weights(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    (tmp_path / "README.md").write_text("# Of the run\n")
    model = build_rim()
    attach_papers(model, {name: tmp_path / name for name in ("recipe.yaml", "README.md")})
    model.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    assert (tmp_path / "a" / "recipe.yaml").read_text() == "seed: 3\n"
    assert "# Of the run" in (tmp_path / "a" / "README.md").read_text()
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if ".lora_B." in name).add_(1)
    model.save_pretrained(str(tmp_path / "b"), save_embedding_layers=False)
    assert not (tmp_path / "b" / "recipe.yaml").exists()
    assert "# Of the run" not in (tmp_path / "b" / "README.md").read_text()


def test_papers_go_with_their_own_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    model = build_rim()
    attach_papers(model, {"recipe.yaml": tmp_path / "recipe.yaml"})
    model.add_adapter("other", RiMConfig(num_blocks=5, r=4))
    model.set_adapter("other")
    model.save_pretrained(str(tmp_path / "other"), selected_adapters=["other"], save_embedding_layers=False)
    assert not (tmp_path / "other" / "recipe.yaml").exists()
    model.save_pretrained(str(tmp_path / "both"), save_embedding_layers=False)
    assert (tmp_path / "both" / "recipe.yaml").exists()
    text = (tmp_path / "both" / "README.md").read_text()
    assert "in 2 memory blocks" in text  # the card is that of the adapter beside it, not of the active one


def test_a_card_that_was_edited_stays_where_a_run_is_saved_again(tmp_path: Path) -> None:
    model = build_rim()

    def save(run: str) -> str:
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(run)
        (folder / "README.md").write_text(f"# {run}\n")
        attach_papers(model, {name: folder / name for name in ("run.json", "README.md")})
        model.save_pretrained(str(tmp_path / "out"), save_embedding_layers=False)
        assert (tmp_path / "out" / "run.json").read_text() == run
        return (tmp_path / "out" / "README.md").read_text()

    assert "# first\n" in save("first")
    (tmp_path / "out" / "README.md").write_text("# mine\n")
    assert "# mine\n" in save("first")
    assert "# second\n" in save("second")  # else the card would be that of other weights


def test_other_weights_in_a_runs_own_folder_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Of the run\n")
    model = build_rim()
    attach_papers(model, {"README.md": tmp_path / "README.md"})
    with torch.no_grad():
        model.base_model.memory.rows("default").add_(1)
    with pytest.warns(UserWarning, match="its card and records describe the previous weights"):
        model.save_pretrained(str(tmp_path), save_embedding_layers=False)


@pytest.mark.slow
def test_the_forgotten_import(saved: tuple[Path, Path]) -> None:
    """PEFT's own error, word for word as the card and the docs quote it."""
    base, adapter = saved
    code = """
import sys
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
for load in (
    lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    lambda: AutoModelForCausalLM.from_pretrained(adapter),
):
    try:
        load()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
assert "rim_peft" not in sys.modules
"""
    result = _python(code, str(base), str(adapter))
    assert result.stdout.splitlines() == ["KeyError: 'RIM'"] * 3
    text = (adapter / "README.md").read_text()
    assert "stops with `KeyError: 'RIM'`" in text
    docs = (Path(__file__).parents[2] / "docs" / "troubleshooting" / "sharing.md").read_text()
    assert "## `KeyError: 'RIM'`" in docs


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with serve() as server:
        yield server


_BY_ID = """
import sys, torch, rim_peft
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
revision = sys.argv[1]
prompt = torch.tensor([[20, 30, 40, 50]])
base = AutoModelForCausalLM.from_pretrained("owner/base")
model = PeftModel.from_pretrained(base, "owner/adapter", revision=revision)
print("tokens", model.generate(prompt, max_new_tokens=6).tolist())
model.push_to_hub("owner/copy")
for model in (
    AutoPeftModelForCausalLM.from_pretrained("owner/copy"),
    AutoModelForCausalLM.from_pretrained("owner/copy"),
):
    print("tokens", model.generate(prompt, max_new_tokens=6).tolist())
AutoTokenizer.from_pretrained("owner/base")
"""


@pytest.mark.slow
def test_the_hub_by_pefts_and_transformers_own_ways(hub: Hub, saved: tuple[Path, Path], tmp_path: Path) -> None:
    """A user's process, which knows the Hub's address from its environment alone."""
    base, adapter = saved
    api = HfApi(endpoint=hub.url, token=TOKEN)
    upload(api, "owner/base", {path.name: path for path in base.iterdir()}, commit_message="Base")
    config = (adapter / "adapter_config.json").read_text().replace(str(base), "owner/base")
    files: dict[str, Any] = {"adapter_config.json": config.encode()}
    files["adapter_model.safetensors"] = adapter / "adapter_model.safetensors"
    files["README.md"] = (adapter / "README.md").read_bytes()
    upload(api, "owner/adapter", files, commit_message="First")
    first = hub.repos["owner/adapter"].branches["main"]
    build_rim(r=2).save_pretrained(str(tmp_path / "other"), save_embedding_layers=False)
    other = {path.name: path for path in (tmp_path / "other").iterdir()}
    upload(api, "owner/adapter", other, commit_message="Second")
    expected = build_rim().generate(torch.tensor([[20, 30, 40, 50]]), max_new_tokens=6).tolist()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    result = _python(_BY_ID, first, **environment, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
    assert result.stdout.splitlines() == [f"tokens {expected}"] * 3, result.stderr
    card = ModelCard(hub.files("owner/copy")["README.md"].decode())
    assert card.data.base_model == "owner/base"
    assert 'adapter = "owner/copy"' in card.text
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in card.text


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )
