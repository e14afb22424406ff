"""Every recipe of the repository: two steps of each stage, its base replaced by a tiny one, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rim_peft.demo import RECIPE as DEMO
from rim_peft.recipe import Recipe, load_recipe
from rim_peft.run import train
from rim_peft.tasks.task import GeneratedTask
from tests.conftest import save_base

# Those in compare/ and accelerate/ are no recipes of a run.
RECIPES = [DEMO, *sorted((Path(__file__).parents[2] / "recipes").glob("[!ac]*/*.yaml"))]
# The tiny base has 512 positions, and its tokenizer a token for every byte.
SHORTER = {
    "potions": ["data.options.num_rows=200"],  # some of them of one step
    "ontology": ["data.options.num_kinds=12", "data.options.num_statements=12"],
    "gsm-symbolic": ["data.options.num_rows=64", "data.on_bad_rows=drop"],
}
GSM8K: dict[str, Any] = {
    "question": "Tom has 3 bags of {n} nuts. How many?",
    "answer": "3*{n} = <<3*{n}={m}>>{m} nuts.\n#### {m}",
}
MATH: dict[str, Any] = {
    "problem": "What is three times ${n}$?",
    "solution": "We triple ${n}$. This is $3\\cdot {n}$. The answer is $\\boxed{{{m}}}$.",
}
STRATEGYQA: dict[str, Any] = {"question": "Is {n} even?", "answer": True, "facts": ["{n} is a number.", "{m} is odd."]}
LOGIQA: dict[str, Any] = {
    "context": "All {n} are {m}.",
    "question": "What is {n}?",
    "options": list("wxyz"),
    "answer": 1,
}
PROSQA: dict[str, Any] = {
    "question": "Bob is a k{n}. Is Bob a p or q?",
    "steps": ["Bob is a k{n}.", "k{n} is p."],
    "answer": "Bob is a p.",
}
ROWS: dict[str, Any] = {"question": "What is three times {n}?", "steps": ["3*{n}={m}"], "answer": "{m}"}


def fill(value: Any, n: int) -> Any:
    if isinstance(value, list):
        return [fill(item, n) for item in value]
    return value.format(n=n, m=3 * n) if isinstance(value, str) else value


def write_rows(folder: Path, task: str) -> None:
    folder.mkdir()
    known = {"gsm8k": GSM8K, "math": MATH, "strategyqa": STRATEGYQA, "logiqa": LOGIQA, "prosqa": PROSQA, "rows": ROWS}
    row = known[task]
    for split, first in (("train", 0), ("valid", 100), ("test", 200)):
        rows = [{key: fill(value, first + n) for key, value in row.items()} for n in range(16)]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def architecture(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Name the tiny base of the recipe's architecture; 4-bit layers must be at least 64 wide."""
    name = str(recipe.model.name_or_path).lower()
    width = {} if recipe.model.quantization is None else {"hidden_size": 64}
    if "qwen3" in name:
        return "qwen3", {**width, "tie_word_embeddings": True}
    if "gemma-3" in name:
        return "gemma3", width
    if "smollm2" in name:
        return "llama_tied", {**width, "max_position_embeddings": 2048}
    return ("gpt2" if "gpt2" in name else "llama_tied" if "llama" in name else "llama"), width


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    def build(recipe: Recipe) -> Path:
        name, changes = architecture(recipe)
        folder = tmp_path_factory.getbasetemp() / "-".join([name, *changes])
        if not folder.exists():
            save_base(folder, name, **changes)
        return folder

    return build


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_two_steps_of_each_stage(path: Path, tiny_base: Callable[[Recipe], Path], tmp_path: Path) -> None:
    recipe = load_recipe(path)
    overrides = [f"model.name_or_path={tiny_base(recipe)}", f"output_dir={tmp_path / 'out'}"]
    if isinstance(recipe.task(), GeneratedTask):
        overrides += ["data.options.num_rows=16", *SHORTER.get(recipe.data.task, [])]
    else:
        write_rows(tmp_path / "rows", recipe.data.task)
        overrides.append(f"data.path={tmp_path / 'rows'}")
    for stage in recipe.stages:
        overrides += [f"{stage}.max_steps=2", f"{stage}.per_device_train_batch_size=2", f"{stage}.save_steps=2"]
    run = train(load_recipe(path, [*overrides, "data.validation_rows=4", "evaluation.max_new_tokens=4"]))
    for stage in recipe.stages:
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
    assert [name for name in names if name.startswith(".") or "partial" in name] == [".lock"]


def test_one_gpu_recipes_are_quantised_paged_and_checkpointed() -> None:
    """GPT-2 alone is small enough to stay as it is."""
    paths = [path for path in RECIPES if path.stem.endswith("lora")]
    assert len(paths) == 10
    for path in paths:
        recipe = load_recipe(path)
        assert recipe.model.quantization == (None if "gpt2" in path.name else "nf4")
        for _, args in recipe.stage_trainers():
            assert args.optim.startswith("paged_adamw")
            assert args.gradient_checkpointing
        header = path.read_text().partition("output_dir:")[0]
        for word in ("Purpose", "Command", "Hardware", "Memory", "Time", "Expected", "Source of the values"):
            assert f"# {word}: " in header
        assert header.count("estimate") == 2


def test_gpt2_trains_in_4_bits_too(tiny_base: Callable[[Recipe], Path], tmp_path: Path) -> None:
    """Its layers are no linear ones until bitsandbytes makes them so."""
    path = next(path for path in RECIPES if path.name == "gpt2-lora.yaml")
    write_rows(tmp_path / "rows", "gsm8k")
    overrides = [f"data.path={tmp_path / 'rows'}", f"output_dir={tmp_path / 'out'}", "model.quantization=nf4"]
    source = f"model.name_or_path={tiny_base(load_recipe(path))}"
    steps = ["grounding.max_steps=1", "refinement=null", "grounding.optim=adamw_torch", "data.validation_rows=2"]
    run = train(load_recipe(path, [*overrides, source, *steps]))
    layer: Any = run.model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert run.metrics["stages"]["grounding"]["train_loss"] > 0


def test_a_quantised_base_from_a_config(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", "prosqa")
    recipe = load_recipe(
        next(path for path in RECIPES if path.parts[-2:] == ("prosqa", "tiny.yaml")),
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
