"""The command line from training to answers, as a user runs it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch.testing import assert_close

from rim_peft.cli.main import main
from rim_peft.run.rows import fingerprint
from rim_peft.tasks.potions import Potions
from tests.integration.test_recipes import write_rows

RECIPE = str(Path(__file__).parents[2] / "recipes" / "prosqa" / "tiny.yaml")
PROGRAM = [sys.executable, "-c", "import sys; from rim_peft.cli.main import main; sys.exit(main())"]
SMALL = ["model.config.num_hidden_layers=1", "data.validation_rows=4", "evaluation.max_new_tokens=4"]
STEPS = ["grounding.max_steps=3", "refinement.max_steps=2"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rows"
    write_rows(folder, "prosqa")
    return folder


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of a short training."""
    folder = tmp_path_factory.mktemp("out") / "run"
    assert main(["train", RECIPE, f"data.path={rows}", f"output_dir={folder}", *SMALL, *STEPS]) == 0
    return folder


def run_fresh(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], input=text, capture_output=True, text=True, check=False, timeout=120)


def test_training_prints_results_alone(rows: Path, tmp_path: Path, capsys: Capture) -> None:
    overrides = [
        f"data.path={rows}",
        f"output_dir={tmp_path / 'run'}",
        *SMALL,
        "grounding=null",
        "refinement.max_steps=1",
    ]
    assert main(["train", RECIPE, *overrides]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first == f"adapter: {tmp_path / 'run'}"
    assert re.fullmatch(r"accuracy: [\d.]+ ± [\d.]+ \(4 validation rows, answer rule exact-text\)", second)
    assert "1/1 [" in captured.err  # the progress bar, with the time left
    assert "train_loss" in captured.err


@pytest.mark.slow
def test_two_fresh_processes_evaluate_alike(rows: Path, trained: Path) -> None:
    command = ["evaluate", str(trained), "--task", "prosqa", "--data-path", str(rows), "--limit", "6", "--json"]
    first, second = run_fresh(*command), run_fresh(*command)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    result = json.loads(first.stdout)
    assert (result["task"], result["split"], result["num_rows"], result["num_blocks"]) == ("prosqa", "test", 6, 8)
    assert "Evaluating: 100%" in first.stderr


def test_evaluation_as_a_table(trained: Path, capsys: Capture) -> None:
    command = ["evaluate", str(trained), "--split", "validation", "--by-block", "--num-blocks", "2", "--limit", "4"]
    assert main(command) == 0  # task and data are those of the training
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "prosqa validation, 2 blocks, answer rule exact-text"
    assert [line[:12].rstrip() for line in lines[2:-1]] == ["last block", "  2 steps", "block 1", "block 2"]
    assert lines[-1] == "4 of 4 answers were cut before they ended: raise --max-new-tokens."


def test_a_tasks_options_choose_its_rows(trained: Path, capsys: Capture) -> None:
    command = ["evaluate", str(trained), "--task", "potions", "--limit", "3", "--task-options"]
    assert main([*command, "lengths=[1]", "seed=5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = Dataset.from_list([*islice(Potions(lengths=(1,), seed=5).rows("test"), 3)])
    assert result["data_sha256"] == fingerprint(rows)["sha256"]
    assert (result["task_options"], result["by_length"].keys()) == ({"lengths": [1], "seed": 5}, {"1"})
    assert main([*command, "lengths=[1]"]) == 0
    assert capsys.readouterr().out.startswith("potions test, lengths=[1], 8 blocks, answer rule exact-word\n")


def test_a_question(trained: Path, capsys: Capture) -> None:
    assert main(["generate", str(trained), "--num-blocks", "8", "Is Bob a p or q?"]) == 0
    eight = capsys.readouterr()
    assert main(["generate", str(trained), "--blocks=8", "Is Bob a p or q?"]) == 0
    old = capsys.readouterr()
    assert "--blocks is --num-blocks now." in old.err
    plain = old.out
    assert plain == eight.out
    assert main(["generate", str(trained), "--json", "Is Bob a p or q?"]) == 0
    assert json.loads(capsys.readouterr().out) == {"question": "Is Bob a p or q?", "answer": plain.rstrip("\n")}


def test_questions_from_stdin(trained: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('a?\n\n{"question": "b?"}\nc?\n'))
    assert main(["generate", str(trained), "--num-blocks", "3", "--batch-size", "2", "--max-new-tokens", "3"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["question"] for answer in answers] == ["a?", "b?", "c?"]
    assert all(answer.keys() == {"question", "answer"} for answer in answers)


def test_a_terminal_needs_a_question(trained: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(trained)])
    assert stop.value.code == 2
    assert "give a question, or questions on stdin" in capsys.readouterr().err


def test_the_folder_may_be_moved(trained: Path, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["--data-path", str(rows), "--limit", "6", "--json"]
    assert main(["evaluate", str(trained), *command]) == 0
    before = capsys.readouterr().out
    copy = shutil.copytree(trained, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/base"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(copy), *command]) == 0
    assert capsys.readouterr().out == before


def test_the_card_runs_as_shown(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    card = (trained / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.startswith("import rim_peft")
    monkeypatch.chdir(trained.parent)
    exec(code, {})  # noqa: S102 - what a reader of the card would do
    assert capsys.readouterr().out.endswith("\n")
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["peft", "rim", "latent-reasoning"]


def test_the_record_of_a_run(trained: Path, rows: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    assert record["command"][:3] == ["rim-peft", "train", RECIPE]
    assert record["seed"] == 0
    assert record["data"]["train"]["num_rows"] == 12
    assert record["data"]["validation"]["num_rows"] == 4
    assert record["metrics"]["stages"]["grounding"]["step"] == 3
    assert record["metrics"]["best"]["stage"] in ("grounding", "refinement")
    assert record["versions"]["peft"]
    assert record["wall_seconds"] > 0


def test_the_recipe_as_run_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", str(trained / "recipe.yaml"), f"output_dir={again}"]) == 0
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (trained, again)]
    assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_a_folder_in_use_is_refused(trained: Path, rows: Path, capsys: Capture) -> None:
    command = ["train", RECIPE, f"data.path={rows}", f"output_dir={trained}", *SMALL, *STEPS]
    assert main(command) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"output_dir: must be new or empty, {trained} is not.")
    assert main([*command, "resume=true", "seed=1", "adapter.r=4"]) == 1
    assert "was started with other values of seed, adapter.r." in capsys.readouterr().err
    assert main([*command, "resume=true"]) == 0  # nothing is left to do


def test_a_folder_of_other_things_cannot_be_resumed(rows: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    assert main(["train", RECIPE, f"data.path={rows}", f"output_dir={tmp_path}", "resume=true"]) == 1
    assert "holds no run to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{none}"], "none: is not a folder, and cannot be read from the Hub"),
        (["evaluate", "{run}", "--task", "gsm9k"], "task: no task 'gsm9k', did you mean 'gsm8k'?"),
        (
            ["evaluate", "{run}", "--task", "potions", "--task-options", "step=sentences"],
            "task_options.step: unknown key, did you mean steps?",
        ),
        (["evaluate", "{run}", "--task-options", "steps"], "steps: must read key=value"),
        (["evaluate", "{run}", "--split", "tset"], "has no split 'tset'"),
        (["evaluate", "{run}", "--data-path", "{none}"], "path: no file or folder"),
        (["generate", "{run}/grounding", "a?"], "must hold an adapter"),
    ],
)
def test_errors_are_clear(trained: Path, tmp_path: Path, arguments: list[str], message: str, capsys: Capture) -> None:
    values = {"run": str(trained), "none": str(tmp_path / "none")}
    assert main([argument.format(**values) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_failure_before_training_leaves_no_folder(tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", RECIPE, f"data.path={tmp_path / 'none'}", f"output_dir={tmp_path / 'run'}"]) == 1
    assert not (tmp_path / "run").exists()


def wait_for(condition: Callable[[], bool], *, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_a_terminated_run_says_how_to_go_on(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [
        f"data.path={rows}",
        f"output_dir={folder}",
        *SMALL,
        "grounding.max_steps=5000",
        "grounding.save_steps=2",
    ]
    with subprocess.Popen([*PROGRAM, "train", RECIPE, *overrides], stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(folder.glob("grounding/checkpoint-*/trainer_state.json")) or process.poll() is not None)
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    last = err.splitlines()[-1]
    assert last.startswith(f"rim-peft: stopped; resume with: rim-peft train {RECIPE} ")
    assert last.endswith(" resume=true")
