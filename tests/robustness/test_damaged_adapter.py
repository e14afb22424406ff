"""Each file of an adapter's and of an export's folder missing, empty, cut off, flipped, or another run's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rim_peft.export.checking import CheckResult
from rim_peft.recipe import load_recipe
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run import Run, export, load_run
from rim_peft.run.loading import describe_asking
from rim_peft.run.output_folder import listed_files
from rim_peft.tuner.files import file_digests
from tests.conftest import build_rim, build_tokenizer, save_base
from tests.robustness.judging import Case, Verdict, judge

RECIPE = Path(__file__).parents[2] / "rim_peft" / "demo" / "recipe.yaml"
QUESTIONS = ["a?", "What is 7 + 8?"]
IRRELEVANT = ("README.md",)
"""What no answer depends on."""


def answers(run: Run) -> list[str]:
    return list(run.answerer(max_new_tokens=6).answer(QUESTIONS))


def build_run(folder: Path, *, seed: int, template: str, **options: Any) -> Path:
    """A folder as a training leaves it, with its base in it."""
    save_base(folder / "base", seed=seed, tokenizer=build_tokenizer(model_max_length=400 + seed))
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = build_rim(base=base, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.base_model.memory.rows("default").normal_()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    build_tokenizer(model_max_length=400 + seed).save_pretrained(folder)
    overrides = ["model.name_or_path=base", f"data.prompt_template={json.dumps(template)}", "output_dir=out"]
    recipe = load_recipe(RECIPE, [*overrides, f"seed={seed}"], check=False)
    (folder / "recipe.yaml").write_text(write_yaml(resolve(recipe)))
    record = {
        "seed": seed,
        "metrics": {"validation": None},
        "asked": describe_asking(recipe),
        "files": file_digests(folder, listed_files(folder)),
    }
    (folder / "run.json").write_text(json.dumps(record, indent=2))
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of the same shapes."""
    return (
        build_run(tmp_path / "first", seed=0, template="Q: {question}\n"),
        build_run(tmp_path / "second", seed=1, template="Ask: {question}\n", num_blocks=3, lora_alpha=16),
    )


@pytest.fixture
def exports(adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Their exports, without the check in a fresh process, which takes its time."""
    monkeypatch.setattr("rim_peft.export.merged.check", lambda *_, **__: CheckResult(32, 32, 0, 32, 0))
    folders = tmp_path / "first-export", tmp_path / "second-export"
    for adapter, folder in zip(adapters, folders, strict=True):
        export(str(adapter), folder, questions=[f"{number}?" for number in range(32)], max_new_tokens=2)
    return folders


def damages(path: Path, other: Path) -> dict[str, Callable[[], Any]]:
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 2]) + content[middle + 1 :]
    return {
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "cut": lambda: path.write_bytes(content[: middle + 1]),
        "flipped": lambda: path.write_bytes(flipped),
        "of another": lambda: path.write_bytes(other.read_bytes()),
    }


def check_every_file(first: Path, second: Path) -> None:
    expected = answers(load_run(first))
    assert expected != answers(load_run(second))
    wrong = []
    names = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    for name in names:
        for damage, apply in damages(first / name, second / name).items():
            kept = (first / name).read_bytes()
            apply()
            case = Case(
                f"{name} {damage}",
                lambda: None if answers(load_run(first)) == expected else "other answers",
                names=(str(name), str(first), "its weights"),
            )
            outcome = judge(case)
            (first / name).write_bytes(kept)
            is_expected = outcome.verdict is Verdict.RIGHT or str(name) not in IRRELEVANT
            if outcome.verdict is Verdict.WRONG or not is_expected:
                wrong.append(f"{case.name}: {outcome.detail}")
    assert not wrong, "\n".join(wrong)
    assert len(names) > 6
    assert answers(load_run(first)) == expected


@pytest.mark.slow
def test_an_adapters_folder(adapters: tuple[Path, Path]) -> None:
    check_every_file(*adapters)


@pytest.mark.slow
def test_an_exports_folder(exports: tuple[Path, Path]) -> None:
    check_every_file(*exports)


def test_an_export_of_an_earlier_version_is_read(exports: tuple[Path, Path]) -> None:
    folder = exports[0]
    expected = answers(load_run(folder))
    record = json.loads((folder / "rim_export.json").read_text())
    for later in ("files", "sha256", "asked"):
        del record[later]
    (folder / "rim_export.json").write_text(json.dumps(record))
    assert answers(load_run(folder)) == expected
    for name, message in (
        ("tokenizer.json", "must hold a model and a tokenizer"),
        ("config.json", "must hold a model"),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[:40])
        with pytest.raises(ValueError, match=message):
            load_run(folder)
        (folder / name).write_bytes(kept)
    (folder / "rim_export.json").write_text("{")
    with pytest.raises(ValueError, match=r"rim_export\.json: must be JSON"):
        load_run(folder)


def test_a_run_of_an_earlier_version_is_read(adapters: tuple[Path, Path]) -> None:
    folder = adapters[0]
    expected = answers(load_run(folder))
    (folder / "run.json").write_text(json.dumps({"metrics": {}, "seed": 0}))
    assert answers(load_run(folder)) == expected
    shutil.rmtree(folder / "base")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_run(folder)


def test_a_training_that_goes_on_in_a_runs_folder_leaves_files_that_fit(adapters: tuple[Path, Path]) -> None:
    folder = adapters[0]
    (folder / "README.md").write_text("# Of the run\n")
    run = load_run(folder)
    model: Any = run.model
    with torch.no_grad():
        model.base_model.memory.rows("default").add_(1)
    with pytest.warns(UserWarning, match="card and records describe the previous weights"):
        model.save_pretrained(str(folder), save_embedding_layers=False)
    assert answers(load_run(folder)) == answers(run)
