"""Adapters that were stored by earlier versions load and answer as they did then; ``store_adapter.py`` made them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rim_peft import RiMConfig
from rim_peft.run import load_run
from tests.integration.store_adapter import BASE, answer, base_sha256

FOLDER = Path(__file__).with_name("stored_adapter")
STORED = sorted(path.parent for path in FOLDER.glob("*/*/expected.json"))


def by_peft(folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(folder)).eval()


def by_this_package(folder: Path) -> Any:
    return load_run(folder, base=str(BASE)).model


def test_there_are_stored_adapters_of_each_format() -> None:
    assert {folder.parent.name for folder in STORED} == {"v1"}
    assert {folder.name for folder in STORED} == {"memory_only", "plain", "variants"}


@pytest.mark.parametrize("load", [by_peft, by_this_package])
@pytest.mark.parametrize("folder", STORED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_stored_adapter_answers_as_it_did(folder: Path, load: Any) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    assert base_sha256() == expected["base_sha256"], "the demo's base was made anew: keep the old one for this test"
    found = answer(load(folder))
    assert found["tokens"] == expected["tokens"]
    # Other versions of torch and other processors sum in another order.
    assert_close(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_saving_it_again_loses_nothing(folder: Path, tmp_path: Path) -> None:
    by_peft(folder).save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights = "adapter_model.safetensors"
    assert_close(load_file(tmp_path / weights), load_file(folder / weights), rtol=0, atol=0)
    first, second = (PeftConfig.from_pretrained(str(path)) for path in (folder, tmp_path))
    assert isinstance(second, RiMConfig)
    unordered = {"target_modules"}  # a set in PEFT
    assert {**second.to_dict(), "target_modules": None} == {**first.to_dict(), "target_modules": None}
    assert all(set(getattr(second, name)) == set(getattr(first, name)) for name in unordered)


def test_the_adapters_differ_from_the_base_and_from_one_another() -> None:
    answers = [json.loads((folder / "expected.json").read_text())["logits"] for folder in STORED]
    base: Any = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        answers.append(base(input_ids=torch.tensor([[20, 30, 40, 50, 11, 60]])).logits[0, -1].tolist())
    for index, first in enumerate(answers):
        for second in answers[index + 1 :]:
            assert not torch.allclose(torch.tensor(first), torch.tensor(second), atol=0.1)
