"""Every recipe of the repository: two steps of each stage, its base replaced by a tiny one, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.tasks.task import GeneratedTask
from rim_peft.demo import RECIPE as DEMO
from rim_peft.recipe import load_recipe
from rim_peft.run import train
from tests.conftest import build_base, build_tokenizer

# Those in compare/ and accelerate/ are no recipes of a run.
RECIPES = [DEMO, *sorted((Path(__file__).parents[2] / "recipes").glob("[!ac]*/*.yaml"))]
# The tiny base has 512 positions, and its tokenizer a token for every byte.
SHORTER = {"ontology": ["data.options.num_kinds=12", "data.options.num_statements=12"]}
GSM8K: dict[str, Any] = {
    "question": "Tom has 3 bags of {n} nuts. How many?",
    "answer": "3*{n} = <<3*{n}={m}>>{m} nuts.\n#### {m}",
}
PROSQA: dict[str, Any] = {
    "question": "Bob is a k{n}. Is Bob a p or q?",
    "steps": ["Bob is a k{n}.", "k{n} is p."],
    "answer": "Bob is a p.",
}


def fill(value: Any, n: int) -> Any:
    if isinstance(value, list):
        return [fill(item, n) for item in value]
    return value.format(n=n, m=3 * n)


def write_rows(folder: Path, task: str) -> None:
    folder.mkdir()
    row = {"gsm8k": GSM8K, "prosqa": PROSQA}[task]
    for split, first in (("train", 0), ("valid", 100), ("test", 200)):
        rows = [{key: fill(value, first + n) for key, value in row.items()} for n in range(16)]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_base().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_two_steps_of_each_stage(path: Path, tiny_base: Path, tmp_path: Path) -> None:
    overrides = [f"model.name_or_path={tiny_base}", f"output_dir={tmp_path / 'out'}"]
    if isinstance(load_recipe(path).task(), GeneratedTask):
        overrides += ["data.options.num_rows=16", *SHORTER.get(load_recipe(path).data.task, [])]
    else:
        write_rows(tmp_path / "rows", load_recipe(path).data.task)
        overrides.append(f"data.path={tmp_path / 'rows'}")
    for stage in ("grounding", "refinement"):
        overrides += [f"{stage}.max_steps=2", f"{stage}.per_device_train_batch_size=2", f"{stage}.save_steps=2"]
    run = train(load_recipe(path, [*overrides, "data.validation_rows=4", "evaluation.max_new_tokens=4"]))
    for stage in ("grounding", "refinement"):
        figures = run.metrics["stages"][stage]
        assert figures["step"] == 2
        assert figures["train_loss"] > 0
    assert run.metrics["validation"]["num_rows"] == 4
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    expected = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "recipe.yaml",
        "run.json",
        "README.md",
    }
    assert expected <= names
    assert "base" not in names
    assert not any(name.startswith(".") or "partial" in name for name in names)


def test_a_quantised_base(tiny_base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", "prosqa")
    recipe = load_recipe(
        RECIPES[-1],
        [
            f"data.path={tmp_path / 'rows'}",
            f"output_dir={tmp_path / 'out'}",
            "model.config.num_hidden_layers=1",
            "model.quantization=nf4",
            "data.validation_rows=2",
            "grounding.max_steps=1",
            "refinement=null",
            "evaluation.max_new_tokens=2",
        ],
    )
    run = train(recipe)
    base: Any = run.model.get_base_model()
    assert base.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert list(run.metrics["stages"]) == ["grounding"]
