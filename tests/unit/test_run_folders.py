"""Folders of runs as their small files describe them, whole, damaged and hostile."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rim_peft.cli.main import main
from rim_peft.cli.runs import render_runs
from rim_peft.run_folders import RunSummary, describe_run, list_runs

RECIPE = "method: cot\nmodel: {name_or_path: owner/Some-Base}\ndata: {task: gsm8k}\n"


def make_run(folder: Path, *, recipe: str = RECIPE, record: Any = None, **stages: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "recipe.yaml").write_text(recipe)
    os.utime(folder / "recipe.yaml", (0, 0))  # runs of one test started together, so that they are sorted by name
    if record is not None:
        (folder / "run.json").write_text(record if isinstance(record, str) else json.dumps(record))
        (folder / "adapter_config.json").write_text("{}")
    for stage, state in stages.items():
        last = folder / stage / f"checkpoint-{state['global_step']}"
        last.mkdir(parents=True)
        (last / "trainer_state.json").write_text(json.dumps(state))
    return folder


def line(step: int, **values: float) -> dict[str, float]:
    return {"step": step, **values}


def test_stages_add_up_and_the_last_one_is_where_it_stopped(tmp_path: Path) -> None:
    lines = [line(1, num_tokens=10, train_seconds=2.0), line(2, num_tokens=30, train_seconds=4.0, eval_accuracy=0.5)]
    folder = make_run(tmp_path / "a", refinement={"global_step": 2, "max_steps": 8, "log_history": lines})
    (folder / "refinement" / "checkpoint-1").mkdir()
    (folder / "grounding").mkdir()
    (folder / "grounding" / "final.safetensors").touch()
    done = [line(4, num_tokens=50, train_seconds=6.0, eval_accuracy=0.75)]
    (folder / "grounding" / "history.json").write_text(json.dumps(done))
    run = describe_run(folder, tmp_path)
    assert (run.state, run.stage, run.step, run.max_steps) == ("stopped", "refinement", 2, 8)
    assert (run.num_tokens, run.seconds, run.tokens_per_second, run.accuracy) == (80, 10.0, 8.0, 0.75)
    assert (run.method, run.base, run.task) == ("cot", "owner/Some-Base", "gsm8k")


def test_a_checkpoint_on_its_way_does_not_count(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "a", grounding={"global_step": 2, "max_steps": 8, "log_history": [line(2, num_tokens=30)]}
    )
    (folder / "grounding" / "checkpoint-2" / ".manifest.json").write_text("{}")
    (folder / "grounding" / "checkpoint-3").mkdir()
    (folder / "grounding" / "checkpoint-3" / "trainer_state.json").write_text('{"max_steps": 8, "log_hi')
    run = describe_run(folder, tmp_path)
    assert (run.state, run.step, run.max_steps, run.num_tokens) == ("stopped", 2, 8, 30)


@pytest.mark.parametrize(("kind", "state"), [("DivergedError", "diverged"), ("OutOfMemoryError", "failed")])
def test_an_error_that_ended_a_run_is_told(kind: str, state: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    (folder / ".failure.json").write_text(json.dumps({"kind": kind, "message": "no\nmore"}))
    run = describe_run(folder, tmp_path)
    assert (run.state, run.detail, run.stage) == (state, "no more", None)


def test_the_latest_comes_first_and_others_are_not_runs(tmp_path: Path) -> None:
    for name, started in (("old", "2026-01-01T00:00:00Z"), ("new", "2026-03-01T00:00:00Z")):
        make_run(tmp_path / "below" / name, record={"started": started})
    make_run(tmp_path / "below" / "new" / "base" / "inside", record={})  # in a run's own folder
    make_run(tmp_path / ".hidden" / "run", record={})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.yaml").write_text(RECIPE)
    assert [run.folder for run in list_runs(tmp_path)[0]] == ["below/new", "below/old"]
    (tmp_path / "recipe.yaml").write_text(RECIPE)  # beside a run with the name of a stage
    make_run(tmp_path / "baseline", record={"started": "2025-01-01T00:00:00Z"})
    assert [run.folder for run in list_runs(tmp_path)[0]] == ["below/new", "below/old", "baseline"]
    with pytest.raises(NotADirectoryError, match=r"must be a folder with runs, got .*missing"):
        list_runs(tmp_path / "missing")


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ("{", r"run\.json cannot be read \(JSONDecodeError\)"),
        ("[" * 100_000, r"run\.json cannot be read \(RecursionError\)"),
        ("3", r"run\.json must hold keys and values"),
        ("\xff", r"run\.json cannot be read"),
    ],
)
def test_damaged_records_are_shown_as_such(record: str, found: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", record=record)
    if record == "\xff":
        (folder / "run.json").write_bytes(b"\xff")
    run = describe_run(folder, tmp_path)
    assert run.state == "damaged"
    assert run.method == "cot"
    assert run.detail is not None
    assert re.search(found, run.detail)


def test_a_hostile_recipe_costs_nothing(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
    )
    run = describe_run(make_run(tmp_path / "a", recipe=bomb), tmp_path)
    assert (run.state, run.method) == ("damaged", None)
    tag = describe_run(make_run(tmp_path / "b", recipe="method: !!python/name:os.system ''\n"), tmp_path)
    assert tag.state == "damaged"


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside", record={"method": "secret"})
    inside = tmp_path / "inside"
    run = make_run(inside / "run")
    (run / "run.json").symlink_to(outside / "run.json")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(outside / "run.json")
    (inside / "linked").symlink_to(outside)
    runs, notes = list_runs(inside)
    assert [each.folder for each in runs] == ["run"]
    assert runs[0].detail == "run.json cannot be read (a link out of the folder)"
    assert notes == ["not searched: 1 links to folders"]
    assert (outside / "run.json").read_text() == json.dumps({"method": "secret"})


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    os.mkfifo(folder / ".failure.json")
    assert describe_run(folder, tmp_path).detail == ".failure.json cannot be read (not a file)"


def test_values_of_other_types_are_not_there(tmp_path: Path) -> None:
    record = {
        "method": 3,
        "started": [],
        "metrics": {"validation": [1]},
        "training": {"seconds": "x", "num_tokens": True},
    }
    run = describe_run(make_run(tmp_path / "a", record={**record, "data": None, "base": {}}), tmp_path)
    assert (run.state, run.method, run.accuracy, run.seconds, run.num_tokens) == ("finished", "cot", None, None, None)
    assert run.started is not None  # the time of its recipe


def test_lines_fit_and_have_no_effect_on_a_terminal() -> None:
    hostile = RunSummary("x" * 300 + "\x1b[31m\nend", "stopped", stage="refinement", step=123456, max_steps=1234567)
    large = RunSummary(
        "deep/folder/of/a/run-with-a-name", "running", None, "grounding", 999999, 1000000, "coconut",
        "owner/A-Very-Long-Name-Of-A-Base-70B-Instruct", "rim_peft.tasks.logic:ProsQA", 0.12345, 0.1, 359999.0,
        123_456_789_012, 123456.7, 141312.4, "2026-11-30T12:00:00Z",
    )  # fmt: skip
    head, *lines = render_runs([hostile, large, RunSummary(".", "finished")])
    assert head.split()[:3] == ["run", "state", "method"]
    assert max(map(len, [head, *lines])) <= 100
    assert lines[0].startswith("xx")
    assert "\x1b" not in lines[0]
    assert "0.123" in lines[1]
    assert "123G" in lines[1]
    assert lines[2].split() == [".", "finished"]
    assert render_runs([]) == []
    alike = [RunSummary("a", "finished", started=f"2026-0{month}-01T00:00:00Z") for month in (1, 2)]
    assert [shown.split()[-1] for shown in render_runs(alike)] == ["date", "01-01", "02-01"]
    absurd = RunSummary("a", "stopped", method="m" * 400, accuracy=9e17, seconds=9e17, num_tokens=10**17)
    assert max(map(len, render_runs([absurd]))) <= 100


def test_the_command_says_what_is_wrong_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "a", record="{")
    make_run(tmp_path / "runs" / "b", record={"metrics": {"validation": {"accuracy": 0.5, "standard_error": 0.1}}})
    (tmp_path / "runs" / "linked").symlink_to(tmp_path)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    first_cells = [line.split()[:2] for line in shown.out.splitlines()]
    assert first_cells == [["run", "state"], ["a", "damaged"], ["b", "finished"]]
    assert shown.err.splitlines() == [
        "a: run.json cannot be read (JSONDecodeError)",
        "not searched: 1 links to folders",
    ]
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["standard_error"] for run in document["runs"]] == [None, 0.1]
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none")]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"no runs in {tmp_path / 'none'}\n")
    assert main(["runs", str(tmp_path / "missing")]) == 1
    assert "folder: must be a folder with runs, got" in capsys.readouterr().err
