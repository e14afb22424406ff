"""SmolLM2-135M-Instruct, fetched once: tests here are marked ``real`` and run by ``make test-real``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_peft import RiMConfig
from rim_peft.recipe import load_recipe
from rim_peft.run import train
from rim_peft.run.named_bases import find_base

RECIPE = str(Path(__file__).parents[2] / "recipes" / "potions" / "smollm2.yaml")
NAME = "smollm2-135m@package"

STORIES = [
    "Finn shakes Moe's brew. Moe stirs Dan's brew. Dan's brew is blue. What colour is Finn's brew?",
    "Liv's brew is red. What colour is Liv's brew?",
    "Tom boils Kim's brew. Kim salts Pam's brew. Pam burns Hal's brew. Hal's brew is gold. What colour is Tom's brew?",
    "How many legs do three cats and two hens have together?",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What do cows drink?"},
        {"role": "assistant", "content": "Water"},
        {"role": "user", "content": "And calves?"},
    ],
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: a base of half a gigabyte is not part of every run."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def folder() -> str:
    return find_base(NAME)


@pytest.fixture(scope="session")
def smol_tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def load_smol(folder: str, **options: Any) -> Any:
    """The base on the CPU; each call reads its files again."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def attach(base: Any, **options: Any) -> Any:
    """An adapter whose LoRA does something, without drowning what the base has learned."""
    torch.manual_seed(1)
    model: Any = get_peft_model(base, RiMConfig(**{"num_blocks": 3, "r": 4, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.01)
    return model.eval()


@pytest.fixture(scope="module")
def rim(folder: str) -> Any:
    return attach(load_smol(folder))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe leaves after a few steps on stories of one step."""
    out = tmp_path_factory.mktemp("run") / "out"
    stage = {"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 4, "logging_steps": 2, "warmup_steps": 0}
    overrides = [f"{name}.{key}={value}" for name in ("grounding", "refinement") for key, value in stage.items()]
    recipe = load_recipe(
        RECIPE,
        [
            f"model.name_or_path={NAME}",
            f"output_dir={out}",
            "adapter={num_blocks: 2, r: 8}",
            "data.options={num_rows: 96, lengths: [1]}",
            "data.validation_rows=8",
            "grounding.learning_rate=2e-3",
            "grounding.loraplus_lr_ratio=1",
            "grounding.lr_scheduler_type=constant",  # the recipe's falls over the last 200 steps
            "grounding.lr_scheduler_kwargs={}",
            "refinement.lr_scheduler_type=constant",
            *overrides,
        ],
    )
    train(recipe)
    return out
