"""The model card."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from rim_peft.run.record import render_run_card
from rim_peft.tasks import TASKS

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


RECIPE = "model: {name_or_path: openai-community/gpt2, revision: v1.0}\ndata: {task: gsm8k}\n"


def render(**changes: Any) -> str:
    return render_run_card("run", record(**changes), RECIPE)


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = front_matter(render())
    assert data["tags"] == ["peft", "rim", "latent-reasoning"]
    assert data["base_model"] == "openai-community/gpt2"
    assert data["library_name"] == "peft"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"type": "owner/rows", "name": "gsm8k", "split": "validation"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 0.25)
    assert "last-number-float" in metric["name"]
    assert metric["args"] == {"standard_error": 0.0625, "num_rows": 48}


def test_the_code_starts_with_the_import() -> None:
    card = render()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.startswith("import rim_peft")
    assert 'AutoModelForCausalLM.from_pretrained("openai-community/gpt2", revision="v1.0")' in code
    assert r'"Q: {question}\n".format(' in code
    compile(code, "card", "exec")


def test_folders_are_no_ids_of_the_hub(tmp_path: Path) -> None:
    data = {**record()["data"], "path": str(tmp_path)}
    card = render(base=None, data=data)
    assert "run = load_run(adapter)" in card
    assert "base_model" not in front_matter(card)
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["type"] == "gsm8k"


def test_nothing_measured_nothing_claimed() -> None:
    card = render(metrics={"validation": None})
    assert "nothing was measured" in card
    assert "model-index" not in front_matter(card)


@pytest.mark.parametrize("task", ["gsm8k", "potions", "my.module:Task"])
def test_every_task_has_a_question(task: str) -> None:
    card = render(data={**record()["data"], "task": task})
    assert f"| task | `{task}` |" in card
    for method in ("answer", "cot", "pause", "coconut"):
        assert len(render(method=method)) > 1000


def test_all_that_it_takes_to_repeat_the_run() -> None:
    data = {**record()["data"], "train": {"num_rows": 9, "sha256": "ab12"}, "validation": {"num_rows": 48}}
    card = render(
        data=data,
        command=["rim-peft", "train", "a b.yaml", "seed=3"],
        metrics={"validation": VALIDATION, "best": {"stage": "refinement", "step": 7}},
        versions={"rim-peft": "0.1", "torch": "2.13"},
        hardware={"cpu_cores": 2},
    )
    for part in (
        "| training rows | 9 of `owner/rows`, SHA-256 `ab12` |",
        "| validation rows | 48 of `owner/rows` |",
        "| base | `openai-community/gpt2`, revision `v1.0` |",
        "| seed | 0 |",
        "| parameters trained | 1,234 of 56,789 |",
        "| best weights | stage refinement, step 7 |",
        "| made with | rim-peft 0.1, torch 2.13 |",
        "| time | 12.5 s, on 2 CPU cores |",
        "```bash\nrim-peft train 'a b.yaml' seed=3\n```",
        f"```yaml\n{RECIPE}```",
        "| 48 for validation | last-number-float | 0.250 | 0.062 |",
        "## Licence and citation",
        "eprint = {2605.30343}",
    ):
        assert part in card, part


def test_the_hubs_library_reads_back_what_was_written() -> None:
    card = ModelCard(render())  # raises where the front matter is malformed
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_name) == (0.25, "gsm8k")
    assert result.metric_args == {"standard_error": 0.0625, "num_rows": 48}
    assert card.data.model_name == "run"
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("task", TASKS)
def test_the_code_asks_a_question_of_the_task(task: str) -> None:
    card = render(data={**record()["data"], "task": task})
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (prompt,) = re.findall(r"^prompt = (.*)$", code, re.MULTILINE)
    assert len(ast.literal_eval(prompt.partition("question=")[2].removesuffix(")"))) > 10
    (command,) = re.findall(r"Or in a shell: `(rim-peft generate run .*)`\.$", card, re.MULTILINE)
    assert len(shlex.split(command)) == 4


def test_the_hub_links_the_rows_that_lie_there() -> None:
    assert front_matter(render())["datasets"] == ["owner/rows"]
    assert "datasets" not in front_matter(render(data={**record()["data"], "path": "/a/folder/of/rows"}))
