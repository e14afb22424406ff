"""The model card."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rim_peft.run.card import render_card

VALIDATION = {"answer_rule": "last-number-float", "accuracy": 0.25, "standard_error": 0.0625, "num_rows": 48}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "method": "rim",
        "seed": 0,
        "wall_seconds": 12.5,
        "resumed": False,
        "metrics": {"validation": VALIDATION},
        "parameters": {"trainable": 1234, "all": 56789},
        "base": "openai-community/gpt2",
        "blocks": {"num_blocks": 8, "block_size": 2},
        "data": {"task": "gsm8k", "path": "owner/rows", "prompt_template": "Q: {question}\n", "train": {"num_rows": 9}},
        **changes,
    }


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    data = front_matter(render_card(tmp_path, record()))
    assert data["tags"] == ["peft", "rim", "latent-reasoning"]
    assert data["base_model"] == "openai-community/gpt2"
    assert data["library_name"] == "peft"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"type": "owner/rows", "name": "gsm8k", "split": "validation"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 0.25)
    assert "last-number-float" in metric["name"]
    assert metric["args"] == {"standard_error": 0.0625, "num_rows": 48}


def test_the_code_starts_with_the_import(tmp_path: Path) -> None:
    card = render_card(tmp_path, record())
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.startswith("import rim_peft")
    assert 'AutoModelForCausalLM.from_pretrained("openai-community/gpt2")' in code
    assert r'"Q: {question}\n".format(' in code
    compile(code, "card", "exec")


def test_folders_are_no_ids_of_the_hub(tmp_path: Path) -> None:
    data = {**record()["data"], "path": str(tmp_path)}
    card = render_card(tmp_path, record(base=None, data=data))
    assert 'f"{folder}/base"' in card
    assert "base_model" not in front_matter(card)
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["type"] == "gsm8k"


def test_nothing_measured_nothing_claimed(tmp_path: Path) -> None:
    card = render_card(tmp_path, record(metrics={"validation": None}))
    assert "nothing was measured" in card
    assert "model-index" not in front_matter(card)


@pytest.mark.parametrize("task", ["gsm8k", "potions", "my.module:Task"])
def test_every_task_has_a_question(tmp_path: Path, task: str) -> None:
    card = render_card(tmp_path, record(data={**record()["data"], "task": task}))
    assert f"Task `{task}`" in card
