"""What the README and the examples show runs as shown."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rim_peft.demo import showcase
from rim_peft.escaping import visible
from rim_peft.inference import BlockAnswerer
from rim_peft.run import load_run
from rim_peft.tasks import get_task
from tests.conftest import build_rim, build_tokenizer, save_base
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


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter with two blocks whose base, in its folder, has a chat template."""
    save_base(tmp_path / "base", "llama")
    build_rim(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path)
    return tmp_path


def chat(monkeypatch: pytest.MonkeyPatch, adapter: Path, lines: list[Any], *options: str) -> None:
    """Run the example; lines that are exceptions are raised where a line is read."""
    left = iter([*lines, EOFError()])

    def read(prompt: str) -> Any:
        print(prompt, end="")
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    main = runpy.run_path(str(ROOT / "examples" / "chat.py"))["main"]
    main([str(adapter), "--max-new-tokens", "5", *options])


def test_a_dialogue_streams_what_a_fresh_chat_is_answered(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "1 + 1?",
        "/blocks 0",
        "And 2?",
        "/reset",
        KeyboardInterrupt(),
        "1 + 1?",
        "/blocks two",
        "/help",
        "/quit",
        "?",
    ]
    chat(monkeypatch, adapter, lines, "--system", "Be brief.")
    printed = capsys.readouterr().out
    run = load_run(adapter)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    (first,) = run.answerer(max_new_tokens=5).answer([messages])
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And 2?"}]
    (second,) = run.answerer(max_new_tokens=5, num_blocks=0).answer([messages])
    (again,) = run.answerer(max_new_tokens=5, num_blocks=0).answer([messages[:2]])
    times = r"\n\[first text after \d+ ms, all after \d+ ms, kept 0(, cut at --max-new-tokens)?\]\n"
    parts = re.split(times, printed)[::2]
    assert parts[0] == f"2 blocks> {visible(first)}"
    assert parts[1] == f"2 blocks> 0 blocks> {visible(second)}"
    assert parts[2] == f"0 blocks> 0 blocks> \n0 blocks> {visible(again)}"
    refusal = "[/blocks: must be followed by a number of blocks, got 'two'. Type /blocks 4.]"
    assert parts[3] == f"0 blocks> {refusal}\n0 blocks> [commands: /reset, /blocks N, /quit]\n0 blocks> "


def test_a_dialogue_keeps_its_cache_and_outlives_an_interrupted_answer(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, calls = BlockAnswerer.stream, []

    def interrupt(self: BlockAnswerer, *args: Any) -> Iterator[int]:
        calls.append(args)
        for number, token in enumerate(stream(self, *args)):
            if len(calls) == 2 and number == 1:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(BlockAnswerer, "stream", interrupt)
    chat(monkeypatch, adapter, ["1 + 1?", "And 2?", "And 2?"])
    printed = capsys.readouterr().out
    assert printed.count("[stopped: this turn is not part of the conversation]") == 1
    kept = [int(number) for number in re.findall(r"kept (\d+)", printed)]
    # The interrupted turn's prompt was computed, and is the third one's.
    assert kept == [0, len(calls[1][0])]
    assert calls[1][0] == calls[2][0]


def test_a_dialogue_needs_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        chat(monkeypatch, tmp_path, [])
    assert capsys.readouterr().err.strip().splitlines()[-1].count("error: ") == 1
