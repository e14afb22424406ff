"""``rim-peft check``: what it prints, its JSON and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rim_peft.cli.main import main
from rim_peft.recipe import load_recipe
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import write_yaml
from tests.unit.run.test_preflight import rows_task, write_base, write_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


def test_it_reports_on_every_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("output_dir: x\nmodel: {name_or_path: x}\ndata: {task: gsm8k}\nadapter: {r: -1, num_blcks: 2}\n")
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(b"\xff")
    good = write_recipe(tmp_path, rows=None, data={"path": "owner/rows"})
    assert main(["check", str(bad), good, str(tmp_path / "none.yaml"), str(broken)]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"{good}: ok as far as it was checked"
    assert [line.partition(":")[0] for line in lines[1:]] == ["  not checked", "  not checked"]
    errors = captured.err.splitlines()
    assert errors[:3] == [
        f"{bad}: adapter.num_blcks: unknown key, did you mean num_blocks?",
        f"{bad}: adapter.r: must be an integer of at least 0, got -1.",
        f"{tmp_path / 'none.yaml'}: No such file or directory",
    ]
    assert errors[3].startswith(f"{broken}: must be valid UTF-8")
    assert main(["check", good]) == 0


def test_what_is_said_of_a_run(capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data=rows_task(tmp_path))
    assert main(["check", path, "--base", base, "--device", "cpu", "refinement=null", "adapter.r=2"]) == 0
    out = capsys.readouterr().out
    assert (
        f"{path}: ok\n  base        {base} (LlamaForCausalLM, sdpa)\n  parameters  2,144 trainable, 35,360 frozen"
        in out
    )
    for label, value in (("rows", "8"), ("tokens of a row, mean", "19.0"), ("steps on one device", "4")):
        assert any(line.split() == [*label.split(), value] for line in out.splitlines()), label
    assert "refinement" not in out
    assert "MiB on a CPU" in out


def test_errors_of_a_run_go_to_stderr(capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=None, data={"path": "owner/rows"})
    assert main(["check", path, "adapter.insertion_layer=9", "--base", base]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{path}: has errors\n")
    assert captured.err.splitlines()[-1].startswith(f"{path}: adapter.insertion_layer: must be below")


def test_the_json_document(capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=None, data={"path": "owner/rows"}, refinement=None)
    options = ["--base", base, "--row-tokens", "40", "--device", "cuda", "--json"]
    assert main(["check", path, str(tmp_path / "none.yaml"), *options]) == 1
    good, missing = json.loads(capsys.readouterr().out)["recipes"]
    assert missing == {
        "recipe": str(tmp_path / "none.yaml"),
        "ok": False,
        "errors": [f"{tmp_path / 'none.yaml'}: No such file or directory"],
        "runs": [],
    }
    assert (good["ok"], good["errors"]) == (True, [])
    (run,) = good["runs"]
    (stage,) = run.pop("stages")
    memory = stage.pop("memory")
    assert {type(value) for value in memory.values()} == {int}
    parts = ("weights", "adapter", "optimizer", "gradients", "activations", "logits")
    assert memory["total"] == sum(memory[part] for part in parts) == run["peak"]
    assert set(memory) == {*parts, "most_logits", "total"}
    assert stage == {
        "stage": "grounding",
        "num_rows": None,
        "num_bad_rows": None,
        "mean_tokens": None,
        "longest_tokens": None,
        "tokens_per_epoch": None,
        "num_steps": None,
        "batch": {"samples": 4, "rows": 4, "length": 40},
        "stated_tokens": 40,
        "precision": "bfloat16",
        "optimizer": "adamw_torch_fused",
    }
    assert set(run) == {
        *("methods", "base", "device", "architecture", "attention", "num_trainable", "num_frozen", "peak"),
        *("errors", "not_checked", "notes", "first_rows"),
    }


def test_values_alone_are_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "adapter.r=4"]) == 1
    assert "RECIPE: at least one file must be given" in capsys.readouterr().err


def test_the_schema_for_editors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["check", "--schema"])
    schema = json.loads(capsys.readouterr().out)
    assert schema["definitions"]["recipe"]["properties"]["adapter"]["properties"]["r"]["type"] == ["integer", "null"]


def test_a_comparison(capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, rows=None, data={"path": "owner/rows"}, refinement=None)
    methods: dict[str, Any] = {
        "rim": {"search": {"grounding.learning_rate": [0.1, 0.2]}},
        "as-fast": {"changes": {"grounding.warmup_steps": 5}},
        "small": {"changes": {"adapter.r": 2}},
        "bad": {"changes": {"adapter.insertion_layer": 9}},
        "untrained": {"train": False, "changes": {"method": "answer"}},
    }
    comparison = tmp_path / "compare.yaml"
    comparison.write_text(json.dumps({"output_dir": "out", "recipe": recipe, "methods": methods}))
    assert main(["check", str(comparison), "--base", base, "--row-tokens", "40"]) == 1
    captured = capsys.readouterr()
    named = [line.strip() for line in captured.out.splitlines() if line.startswith("  methods ")]
    assert named == ["methods rim, as-fast", "methods small", "methods bad"]
    assert captured.err.splitlines()[-1].startswith(
        f"{comparison}: methods.bad: adapter.insertion_layer: must be below"
    )
    methods["bad"] = {"changes": {"adapter.num_blcks": 1}}
    comparison.write_text(json.dumps({"output_dir": "out", "recipe": recipe, "methods": methods}))
    assert main(["check", str(comparison), "--base", base]) == 1
    assert (
        f"{comparison}: methods.bad.changes.adapter.num_blcks: unknown key, did you mean num_blocks?"
        in capsys.readouterr().err
    )


def test_a_file_of_accelerates_is_told_from_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((Path(__file__).parents[3] / "recipes" / "accelerate").glob("*.yaml")):
        assert main(["check", str(path)]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"{path}: must be a recipe, got a file of accelerate's. Give it to accelerate launch")


def test_a_folder_in_use_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=None, data={"path": "owner/rows"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").touch()  # a recipe alone is left by a run that failed before it began
    assert main(["check", path]) == 0
    (tmp_path / "out" / "adapter_config.json").touch()
    capsys.readouterr()
    assert main(["check", path]) == 1
    said = f"{path}: output_dir: must be new or empty, {tmp_path / 'out'} is not. Give another folder, or resume=true"
    assert said in capsys.readouterr().err
    recipe = load_recipe(path)
    (tmp_path / "out" / "recipe.yaml").write_text(write_yaml(resolve(recipe)))
    assert main(["check", path, "resume=true"]) == 0
    assert main(["check", path, "resume=true", "seed=7"]) == 1
    assert "was started with other values of seed" in capsys.readouterr().err
