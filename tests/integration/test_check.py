"""Every recipe of the repository through ``rim-peft check``: as it is, and with a tiny base and rows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from rim_peft.cli.main import main
from rim_peft.recipe import load_recipe
from rim_peft.tasks.task import GeneratedTask
from tests.integration.test_recipes import RECIPES, SHORTER, write_rows
from tests.unit.run.test_preflight import write_base

COMPARISONS = sorted((Path(__file__).parents[2] / "recipes" / "compare").glob("*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # paths in recipes are relative to it
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))  # without the bases that this machine may have


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    # Not the recipe's own folder, where whoever has run it has a run.
    code = main(["check", "--json", *arguments, f"output_dir={Path(tempfile.gettempdir(), 'rim-peft', 'no-run')}"])
    (checked,) = json.loads(capsys.readouterr().out)["recipes"]
    assert code == (0 if checked["ok"] else 1)
    return checked


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_with_a_tiny_base(capsys: pytest.CaptureFixture[str], base: str, path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    if isinstance(recipe.task(), GeneratedTask):
        overrides = ["data.options.num_rows=16", *SHORTER.get(recipe.data.task, [])]
    else:
        write_rows(tmp_path / "rows", recipe.data.task)
        overrides = [f"data.path={tmp_path / 'rows'}"]
    checked = check(capsys, str(path), *overrides, "data.validation_rows=4", "--base", base)
    assert checked["ok"], checked
    (run,) = checked["runs"]
    assert (run["not_checked"], [stage["stage"] for stage in run["stages"]]) == ([], recipe.stages)
    for stage in run["stages"]:
        assert stage["longest_tokens"] >= stage["mean_tokens"] > 0
        assert stage["num_steps"] > 0
        assert stage["memory"]["total"] > stage["memory"]["weights"] > 0


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow) if path.name.startswith("gpu-") else path  # their rows take long
        for path in (*RECIPES[1:], *COMPARISONS)
    ],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_a_recipe_as_it_is_has_no_error(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    shared = load_shared(path) if path.parent.name == "compare" else load_recipe(path)
    if shared.model.name_or_path == "rim_peft/demo/base":
        pytest.skip("the demo's base is at hand: looked at with few rows below")
    checked = check(capsys, str(path))
    assert checked["ok"], checked
    assert checked["runs"]
    assert all(run["not_checked"] for run in checked["runs"])  # base or rows are elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_a_comparison_with_few_rows(capsys: pytest.CaptureFixture[str], base: str, path: Path) -> None:
    grid = ["grid={adapter.r: [2]}"] if "ablations" in path.name else []
    num_rows = 200 if path.name == "smollm2-potions.yaml" else 16  # its curriculum begins with rows of one step
    few = [f"changes.data.options.num_rows={num_rows}", "changes.data.validation_rows=4", *grid]
    checked = check(capsys, str(path), *few, "--base", base)
    errors = [error for run in checked["runs"] for error in run["errors"]]
    # The tiny base has fewer layers and positions than the bases that these are for.
    assert [text for text in errors if "insertion_layer: must be below" not in text and "too long" not in text] == []
    assert all(run["num_frozen"] for run in checked["runs"] if not run["errors"])
    assert len({tuple(run["methods"]) for run in checked["runs"]}) == len(checked["runs"])


def load_shared(path: Path) -> Any:
    from rim_peft.comparison.plan import shared_recipe
    from rim_peft.comparison.reading import load_comparison

    return shared_recipe(load_comparison(path))


@pytest.mark.slow
def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    checked = check(capsys, "rim_peft/demo/recipe.yaml", "data.options.num_rows=64", "data.validation_rows=16")
    (run,) = checked["runs"]
    assert (checked["ok"], run["not_checked"], run["notes"]) == (True, [], [])
    # As README.md has it: 0.75M parameters in the base.
    assert 750_000 < run["num_frozen"] < 755_000
    assert [stage["num_steps"] for stage in run["stages"]] == [300, 80]


def test_what_memory_tokens_predict_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("data.options.num_rows=16", "data.options.weights=[0, 0, 1, 0]", "data.validation_rows=null")
    assert main(["check", "rim_peft/demo/recipe.yaml", "method=parallel", *few]) == 0
    shown = capsys.readouterr().out.split("  row 1 ")[1].split("  row 2 ")[0]
    labels = [line[14:24].strip() for line in shown.splitlines()[1:]]
    assert labels == ["in block 1", "in block 2", "in block 3", "block 4", "answer"]
