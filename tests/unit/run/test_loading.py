"""Adapters of all origins."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rim_peft.data.examples import Templates
from rim_peft.export.reading import ExportAnswerer
from rim_peft.inference import answer_questions
from rim_peft.recipe import load_recipe
from rim_peft.run import Run, evaluate, load_run
from rim_peft.run.loading import load_untrained
from tests.conftest import build_base, build_rim, build_tokenizer, save_base

RECIPE = Path(__file__).parents[3] / "rim_peft" / "demo" / "recipe.yaml"


def answers(run: Run) -> list[str]:
    return list(answer_questions(run.model, run.tokenizer, ["a?", "bc?"], max_new_tokens=5))


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, PeftModel]:
    """A folder with ``base`` (and its tokenizer) beside ``adapter``, as save_pretrained leaves them."""
    save_base(tmp_path / "base", tokenizer=tokenizer)
    model = build_rim()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path, model


def test_an_adapter_saved_by_hand(saved: tuple[Path, PeftModel], caplog: pytest.LogCaptureFixture) -> None:
    folder, model = saved
    run = load_run(folder / "adapter")
    assert "has no recipe.yaml, which says how prompts were written in training" in caplog.text
    assert run.recipe is None
    assert run.templates == Templates()
    assert not run.model.training
    assert answers(run) == answers(Run(model, build_tokenizer()))


def test_a_base_that_was_moved_is_named(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    expected = answers(load_run(folder / "adapter"))
    shutil.move(folder / "base", folder / "moved")
    with pytest.raises(OSError, match=r"the base '.*base' of .*adapter cannot be loaded.*Name the base"):
        load_run(folder / "adapter")
    assert answers(load_run(folder / "adapter", base=str(folder / "moved"))) == expected


def test_a_base_in_the_folder_goes_with_it(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    expected = answers(load_run(folder / "adapter"))
    shutil.move(folder / "base", folder / "adapter" / "base")
    shutil.move(folder / "adapter", folder / "elsewhere")
    assert answers(load_run(folder / "elsewhere")) == expected


def test_an_adapter_from_the_hub(saved: tuple[Path, PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved
    asked: list[Any] = []

    def download(name: str, revision: str | None, ignore_patterns: list[str]) -> str:
        asked.append((name, ignore_patterns, revision))
        return str(folder / "adapter")

    monkeypatch.setattr("rim_peft.run.loading.snapshot_download", download)
    assert answers(load_run("owner/adapter")) == answers(load_run(folder / "adapter"))
    assert asked[0][0] == "owner/adapter"
    assert "grounding/*" in asked[0][1]
    assert asked[0][2] is None
    load_run("owner/adapter", revision="v1")
    assert asked[1][2] == "v1"
    recipe = "output_dir: x\nmodel: {name_or_path: x, trust_remote_code: true}\ndata: {task: gsm8k}\n"
    (folder / "adapter" / "recipe.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=r"recipe\.yaml: model\.trust_remote_code: .*base 'x'.*--trust-remote-code"):
        load_run("owner/adapter")


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold an adapter .* Give the folder of an adapter"):
        load_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"has not finished\. If it is yours: rim-peft train .* resume=true"):
        load_run(tmp_path)


def test_a_folder_has_no_revisions(saved: tuple[Path, PeftModel]) -> None:
    with pytest.raises(ValueError, match="revision: must be omitted for a folder, got 'v1'"):
        load_run(saved[0] / "adapter", revision="v1")


def test_damaged_files_are_named_before_the_base_is_loaded(saved: tuple[Path, PeftModel]) -> None:
    weights = saved[0] / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    shutil.rmtree(saved[0] / "base")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: must be a whole safetensors file"):
        load_run(saved[0] / "adapter")


def test_adapters_of_another_kind(tmp_path: Path) -> None:
    get_peft_model(build_base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="must hold a RIM adapter, got one of type"):
        load_run(tmp_path)


def test_a_written_chain_is_read_the_same_from_an_export(tokenizer: PreTrainedTokenizerFast) -> None:
    exported: Any = SimpleNamespace(memory=SimpleNamespace(num_blocks=0))
    recipe = load_recipe(RECIPE, ["method=cot", "data.step_separator=', '"], check=False)
    run = Run(build_rim(num_blocks=0), tokenizer, recipe, exported=exported)
    assert run.separator == ", "
    answerer = run.answerer()
    assert isinstance(answerer, ExportAnswerer)
    assert answerer.record is exported


def test_evaluation_without_a_recipe(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    (folder / "test.json").write_text('[{"question": "a?", "steps": ["x", "y"], "answer": "b"}]')
    run = load_run(folder / "adapter")
    with pytest.raises(ValueError, match="task: must be given"):
        evaluate(run)
    result = evaluate(run, "prosqa", path=str(folder), num_blocks=1, by_block=True)
    assert (result["task"], result["split"], result["num_rows"], result["num_blocks"]) == ("prosqa", "test", 1, 1)
    assert result["by_length"].keys() == {"2"}
    assert len(result["by_block"]) == 1
    assert torch.get_default_dtype() == torch.float32


def test_an_untrained_base_ends_its_answers_as_its_settings_say(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Some chat models end a turn with another token than the tokenizer's EOS."""
    save_base(tmp_path / "base", tokenizer=tokenizer)
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path / 'out'}\nmodel: {{name_or_path: {tmp_path / 'base'}}}\ndata: {{task: gsm8k}}\n"
        "method: answer\nbaseline: {max_steps: 1}\nevaluation: {max_new_tokens: 6}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")

    def answer() -> tuple[list[int], list[str]]:
        answerer = load_untrained(recipe).answerer()
        cut: list[str] = []
        prompts = answerer.encode(["a?"])
        list(answerer.answer_prompts(prompts, batch_size=1, on_cut=cut.append))
        return answerer.decode(prompts)[0], cut

    whole, cut = answer()
    assert len(whole) == 6
    assert len(cut) == 1
    end = whole[2]
    assert end not in whole[:2]
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end]).save_pretrained(tmp_path / "base")
    assert answer() == (whole[:3], [])
