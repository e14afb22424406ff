"""Real runs: what they record is documented, and `rim-peft runs` finds their state without importing torch."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import rim_peft
from rim_peft import run_folders
from rim_peft.cli.main import main
from rim_peft.methods import METHODS
from rim_peft.recipe import load_recipe
from rim_peft.run import output_folder, train
from rim_peft.training import checkpoints, curriculum, files, watching
from rim_peft.training.finite import DivergedError
from rim_peft.training.samples import Sample
from rim_peft.tuner.files import RECORD_FILE
from tests.integration.test_check_and_train import write_recipe
from tests.integration.test_curriculum import SignalAtStep

DOCS = Path(rim_peft.__file__).parents[1] / "docs" / "records.md"
STAGE = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, Sequence[Sample]]]]:
    """The folder of a run, and the samples that a tracker got."""
    folder = tmp_path_factory.mktemp("runs")
    sent: list[tuple[int, Sequence[Sample]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "trackers_of", lambda report_to: ["wandb"])
        patch.setattr(
            watching, "send_samples", lambda samples, trackers, *, step, callbacks: sent.append((step, samples))
        )
        stages = {"grounding": {**STAGE, "length_shares": [0.5, 0.5]}, "refinement": STAGE}
        assert main(["train", write_recipe(folder, base, evaluation={"sample_rows": 1}, **stages)]) == 0
    return folder, sent


def _rows(heading: str) -> dict[str, str]:
    """Documented keys below a heading, as regular expressions, with their meaning."""
    text = DOCS.read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## `{heading}`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| (.*) \|$", part, re.MULTILINE)
    return {re.sub(r"<\w+>", ".+", re.escape(key)): meaning for key, meaning in rows}


def _keys(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from _keys(inside, f"{path}.{key}" if path else key)
    else:
        yield path


def _check(found: set[str], documented: dict[str, str]) -> None:
    assert not {key for key in found if not any(re.fullmatch(pattern, key) for pattern in documented)}
    needed = [pattern for pattern, meaning in documented.items() if "Only" not in meaning]
    assert not [pattern for pattern in needed if not any(re.fullmatch(pattern, key) for key in found)]


def test_every_key_of_a_record_is_documented(finished: tuple[Path, Any]) -> None:
    kept = json.loads((finished[0] / "out" / RECORD_FILE).read_text(encoding="utf-8"))
    _check(set(_keys(kept)), _rows("run.json"))


def test_every_key_of_a_history_is_documented(finished: tuple[Path, Any]) -> None:
    lines: list[dict[str, Any]] = []
    for stage in ("grounding", "refinement"):
        lines += json.loads((finished[0] / "out" / stage / "history.json").read_text(encoding="utf-8"))
    _check({key for line in lines for key in line}, _rows("history.json"))


def test_samples_are_read_after_every_evaluation(finished: tuple[Path, Any]) -> None:
    _, sent = finished
    assert [step for step, _ in sent] == [1, 2, 1, 2]
    for _, (sample,) in sent:
        assert re.fullmatch(r"\d \+ 1\?", sample.question)
        assert list(sample.readouts) == ["block 1", "block 2"]
        assert sample.answer == str(int(sample.question[0]) + 1)
        assert sample.is_right == (sample.readouts["block 2"] == sample.answer)


def test_a_finished_run(finished: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = finished
    capsys.readouterr()
    assert main(["runs", str(folder), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    kept = json.loads((folder / "out" / RECORD_FILE).read_text(encoding="utf-8"))
    assert {key: run[key] for key in ("folder", "state", "stage", "method", "task", "base", "started")} == {
        "folder": "out",
        "state": "finished",
        "stage": None,
        "method": "rim",
        "task": kept["data"]["task"],
        "base": kept["base"],
        "started": kept["started"],
    }
    assert run["accuracy"] == kept["metrics"]["validation"]["accuracy"]
    assert (run["num_tokens"], run["seconds"]) == (kept["training"]["num_tokens"], kept["training"]["seconds"])
    with files.hold(folder / "out"):
        assert main(["runs", str(folder / "out")]) == 0
    assert re.search(r"^\. +running +rim ", capsys.readouterr().out, re.MULTILINE)


def test_the_command_imports_neither_torch_nor_transformers(finished: tuple[Path, Any]) -> None:
    code = (
        "import sys, rim_peft_command\n"
        f"sys.argv = ['rim-peft', 'runs', {str(finished[0])!r}]\n"
        "assert rim_peft_command.main() == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "finished" in found.stdout


def test_a_stopped_run_and_one_that_diverged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[str, Any]:
        capsys.readouterr()
        assert main(["runs", str(tmp_path), "--json"]) == 0
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        return dict(run)

    path = write_recipe(tmp_path, base, grounding=STAGE)
    with monkeypatch.context() as patch:
        SignalAtStep(patch, "grounding", 0, signal.SIGTERM)
        assert main(["train", path]) == 143
    run = state()
    assert [run[key] for key in ("state", "stage", "step", "max_steps")] == ["stopped", "grounding", 1, 2]
    assert run["accuracy"] == 0.0 or run["accuracy"] is None
    assert run["num_tokens"] > 0

    def diverge(*args: Any, **kwargs: Any) -> None:
        raise DivergedError("grounding", "the loss of step 2 is nan")

    recipe = load_recipe(path, ["resume=true"])
    with monkeypatch.context() as patch:
        patch.setattr("rim_peft.run.training.run_stages", diverge)
        with pytest.raises(DivergedError):
            train(recipe)
    run = state()
    assert (run["state"], run["step"]) == ("diverged", 1)
    assert "the loss of step 2 is nan" in run["detail"]
    train(recipe)
    assert state()["state"] == "finished"
    assert not (tmp_path / "out" / run_folders.FAILURE_FILE).exists()


def test_names_are_those_of_the_modules_that_write_the_files() -> None:
    assert (run_folders._RECIPE, run_folders._ADAPTER) == (output_folder.RECIPE_FILE, output_folder.ADAPTER_FILE)
    assert run_folders._RECORD == RECORD_FILE
    assert (run_folders._LOCK, run_folders._HOLDER) == (files.LOCK, files.HOLDER)
    assert (run_folders._FINAL, run_folders._HISTORY) == (curriculum.FINAL, curriculum.HISTORY)
    assert f"{checkpoints.PREFIX_CHECKPOINT_DIR}-" == run_folders._CHECKPOINT
    assert run_folders._MANIFEST == files.MANIFEST
    assert set(run_folders.STAGES) == {stage for method in METHODS.values() for stage in method.stages}
