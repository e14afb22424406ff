"""What the README and the examples show runs as shown."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from rim_peft.demo import showcase
from rim_peft.tasks import get_task
from tests.conftest import build_tokenizer
from tests.integration.test_demo import SHORT
from tests.objectives import prepare_rows

ROOT = Path(__file__).parents[2]


def test_the_readmes_example_runs_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shutil.copytree(ROOT / "rim_peft" / "demo" / "base", tmp_path / "rim_peft" / "demo" / "base")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script))
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(r".* What colour is \w+'s brew\?.*", printed)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_training_both_stages_from_python(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_both_stages.py"))["main"]
    # One operation on five colours is learned within a few steps; what is asked was trained on.
    assert main(tmp_path, max_steps=40) == "gold"


def test_looking_into_blocks(tmp_path: Path) -> None:
    showcase.train_demo(tmp_path / "demo", seed=0, overrides=SHORT, command=[])
    main = runpy.run_path(str(ROOT / "examples" / "look_into_blocks.py"))["main"]
    lines = main(str(tmp_path / "demo"), ["Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?"])
    assert len(lines) == 1 + 4
    assert all(re.search(r"block \d: .* with probability \d\.\d{3}", line) for line in lines[1:])


def test_a_task_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "examples.own_task", raising=False)
    task = get_task("examples.own_task:ColumnAddition", num_digits=2, num_rows=20)
    splits = {split: task.load(split) for split in ("train", "validation", "test")}
    questions = [set(rows["question"]) for rows in splits.values()]
    assert not questions[0] & questions[1]
    assert not questions[0] & questions[2]
    prepared = prepare_rows(splits["train"], build_tokenizer(), needs_steps=True, num_blocks=2, block_length=4)
    assert len(prepared) == 20
    assert task.is_correct("132", "132")
    assert not task.is_correct("1325", "132")
