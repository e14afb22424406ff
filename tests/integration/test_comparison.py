"""A comparison from its recipe to its report: every method, tiny trainings, the shipped base."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from transformers import AutoTokenizer

from rim_peft.cli.main import main
from rim_peft.comparison import timing
from rim_peft.comparison.plan import plan_runs, shared_recipe
from rim_peft.comparison.reading import check_runs, load_comparison
from rim_peft.comparison.rows import load_judged_rows
from rim_peft.comparison.runner import BusyError, list_runs, run_comparison
from rim_peft.comparison.sections import name_of
from rim_peft.demo import BASE, RECIPE
from rim_peft.evaluation.latency import Way
from rim_peft.recipe import RecipeError
from rim_peft.tasks.potions import Potions

STAGE = {"max_steps": 3, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1}
STAGES = ("grounding", "refinement", "baseline", "coconut")
METHODS: dict[str, Any] = {
    "base": {"train": False, "changes": {"method": "answer"}},
    "answer": {"label": "LoRA", "changes": {"method": "answer"}},
    "answer-same-compute": {"changes": {"method": "answer"}, "same_compute_as": "rim"},
    "cot": {"changes": {"method": "cot", "data.step_separator": ", ", "evaluation.max_new_tokens": 12}},
    "pause": {"changes": {"method": "pause"}},
    "coconut": {"changes": {"method": "coconut", "coconut.num_stages": 2, "data.step_separator": ", "}},
    "rim": {},
}
ROWS = {"rows": 12, "options": {"seed": 1, "num_held_out": 12, "weights": None}}


def write(folder: Path, **changes: Any) -> Path:
    shared = {f"{stage}.{key}": value for stage in STAGES for key, value in STAGE.items()}
    recipe = {
        "output_dir": str(folder / "out"),
        "recipe": str(RECIPE),
        "seeds": [0],
        "changes": {
            **shared,
            "model.name_or_path": str(BASE),
            "data.options.num_rows": 16,
            "data.options.num_held_out": 8,
            "data.validation_rows": 4,
            "grounding.save_total_limit": None,
        },
        "methods": METHODS,
        "measures": {"budget": [0, 4], "latency_batch_sizes": [1, 2], "latency_questions": 3},
        "test": ROWS,
        "selection": {"split": "validation", **ROWS},
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def numbers(results: dict[str, Any]) -> Any:
    """Everything that does not depend on the clock or the folder."""
    if isinstance(results, dict):
        hidden = {"started", "finished", "command", "folder", "seconds", "latency", "name", "sha256"}
        return {key: numbers(value) for key, value in results.items() if key not in hidden and not key.endswith("_ms")}
    return [numbers(value) for value in results] if isinstance(results, list) else results


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("comparison")
    results = run_comparison(load_comparison(write(folder)), command=["rim-peft", "compare", "compare.yaml"])
    return folder, results


def test_every_method_is_trained_measured_and_reported(done: tuple[Path, dict[str, Any]]) -> None:
    folder, results = done
    runs = {run["name"]: run for run in results["runs"]}
    assert set(runs) == set(METHODS)
    assert runs["base"]["training"] is None
    assert {
        name: run["training"]["num_samples"] for name, run in runs.items() if name in ("answer", "cot", "pause")
    } == {
        "answer": 12,
        "cot": 12,
        "pause": 12,
    }
    rim, more = runs["rim"]["training"], runs["answer-same-compute"]["training"]
    assert rim["num_samples"] == 24
    # Within two of its steps, whose rows differ in length.
    assert abs(more["num_tokens"] - rim["num_tokens"]) <= 2 * runs["answer"]["training"]["num_tokens"] / 3
    for name, run in runs.items():
        assert run["accuracy"]["exact-word"]["num_rows"] == results["data"]["test"]["num_rows"]
        assert (run["blocks"] is None) == (name not in ("rim", "pause"))
        assert (run["budget"] is None) == (name != "rim")
    assert [point["num_blocks"] for point in runs["rim"]["budget"]] == [0, 4]
    assert all(len(run["recipe_sha256"]) == 64 for run in runs.values())
    assert {method["name"]: method["view"] for method in results["methods"]}["answer"] == "own"  # 12 samples, not 24
    final = runs["rim"]["accuracy"]["exact-word"]
    assert runs["rim"]["budget"][1]["accuracy"] == final
    assert runs["rim"]["selection"]["final"] == runs["rim"]["blocks"]["by_block"][-1]["all"] == final
    names = [control["name"] for control in runs["rim"]["controls"]]
    assert {"removed", "shuffled", "swapped"} <= set(names)
    assert runs["rim"]["controls"][names.index("removed")]["accuracy"] == runs["rim"]["budget"][0]["accuracy"]
    assert runs["rim"]["faithfulness"]["by_block"][0]["block"] == 1
    steps = [point["step"] for point in results["representations"]["training"]["points"] if point["block"] == 1]
    assert steps == [2, 3, 3]  # stage 1 keeps both of its checkpoints, stage 2 the last one
    assert {(row["name"], row["batch_size"]) for row in results["latency"]} == {
        (name, size) for name in ("answer", "cot", "pause", "coconut", "rim") for size in (1, 2)
    }
    assert {pair["name"] for pair in results["pairs"]} == set(METHODS) - {"rim"}
    written = json.loads((folder / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    page = (folder / "out" / "results.html").read_text()
    text = (folder / "out" / "results.md").read_text()
    assert 'href="runs/rim/seed-0/questions.html"' in page
    questions = (folder / "out" / "runs" / "rim" / "seed-0" / "questions.html").read_text()
    told = re.findall(r'<p class="remark"><bdi>(Right|Wrong): the row&#x27;s answer is “[a-z]+”\.</bdi></p>', questions)
    num_right = final["num_correct"]
    num_wrong = min(final["num_rows"] - num_right, max(5, 10 - num_right))
    assert told == ["Wrong"] * num_wrong + ["Right"] * min(num_right, 10 - num_wrong)
    for label in ("LoRA", "cot", "coconut"):
        assert label in page
        assert label in text
    assert (
        len(list((folder / "out" / "plots").glob("*.svg"))) == len(list((folder / "out" / "plots").glob("*.png"))) > 5
    )


def test_what_is_finished_is_not_made_again(
    done: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("adapter_model.safetensors")}
    again = run_comparison(load_comparison(folder / "compare.yaml"))
    assert numbers(again) == numbers(results)
    assert again["latency"] == results["latency"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main(["compare", str(folder / "compare.yaml"), "--plan"]) == 0
    assert capsys.readouterr().out.count("finished") == len(METHODS)


def test_the_answer_of_a_chain_is_timed_from_where_it_is_judged(
    done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = load_comparison(done[0] / "compare.yaml", ["measures.latency_questions=2"])
    plan = plan_runs(comparison)
    rows = load_judged_rows(comparison, shared_recipe(comparison), check_runs(comparison, plan))
    answers = ("blue", "red, blue")
    changed = [replace(row, answer=answer) for row, answer in zip(rows.test, answers, strict=False)]
    ways: list[Way] = []
    monkeypatch.setattr(timing, "measure_latency", lambda asked, **_: ways.extend(asked) or [])
    monkeypatch.setattr(timing, "write_text", lambda *_: None)
    timing.time_methods(comparison, plan, replace(rows, test=changed))
    (counts,) = (way.answer_tokens for way in ways if way.name == "cot")
    tokens = AutoTokenizer.from_pretrained(BASE)("plum, red, blue", add_special_tokens=False)["input_ids"]
    assert isinstance(counts, list)
    assert [count(tokens) for count in counts] == [1, 3]


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_numbers(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, results = done
    methods = {name: METHODS[name] for name in ("answer", "coconut", "rim")}
    path = write(tmp_path, methods=methods, measures={"latency_batch_sizes": [], "budget": [0, 4]})
    again = run_comparison(load_comparison(path))
    kept = [run for run in results["runs"] if run["name"] in methods]
    assert sorted(map(str, numbers(again["runs"]))) == sorted(map(str, numbers(kept)))


@pytest.mark.slow
def test_searched_values_are_chosen_on_the_selection_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"baseline.learning_rate": [10.0, 1e-9], "baseline.lr_scheduler_type": ["constant"]}
    answer = {"changes": {"method": "answer"}, "search": rates}
    methods = {"rim": {}, "answer": answer, "more": {**answer, "same_compute_as": "rim"}}
    measures = {"blocks": False, "budget": [], "controls": False, "faithfulness": False, "representations": False}
    rows = {"rows": 40, "options": {**ROWS["options"], "num_held_out": 40}}
    path = write(
        tmp_path,
        methods=methods,
        seeds=[3, 4],
        measures={**measures, "latency_batch_sizes": [1], "latency_questions": 2},
        selection={"split": "validation", **rows},
    )
    assert main(["compare", str(path), "--plan"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert len(planned) == 6 + 4
    trial = "answer, seed 3, trying baseline.learning_rate=10.0,baseline.lr_scheduler_type=constant"
    assert planned.index(f"missing   {trial}") < planned.index("missing   answer, seed 3")
    results = run_comparison(load_comparison(path))
    trials = [entry for entry in results["search"] if entry["name"] == "answer"]
    assert [entry["values"]["baseline.learning_rate"] for entry in trials] == [10.0, 1e-9]
    assert trials[0]["score"]["accuracy"] < trials[1]["score"]["accuracy"]
    assert [entry["is_chosen"] for entry in trials] == [False, True]
    assert {entry["score"]["num_rows"] for entry in trials} == {results["data"]["selection"]["num_rows"]} != {12}
    changes = {method["name"]: method["changes"] for method in results["methods"]}
    assert changes["answer"] == {"method": "answer", **trials[1]["values"]}
    runs = [run for run in results["runs"] if run["name"] == "answer"]
    folder = Path(runs[0]["folder"])
    assert [run["seed"] for run in runs] == [3, 4]
    assert {path.name for path in folder.glob("*.json")} >= {"tried.json", "measured.json"}  # trained once
    rates_tried = (
        tmp_path / "out" / "runs" / "answer" / "baseline.learning_rate=10.0,baseline.lr_scheduler_type=constant"
    )
    assert not (rates_tried / "seed-3" / "measured.json").exists()
    assert not (rates_tried / "seed-4").exists()
    assert "1e-09" in (tmp_path / "out" / "results.md").read_text()
    again = run_comparison(load_comparison(path))
    assert numbers(again) == numbers(results)
    assert main(["compare", str(path), "--plan"]) == 0
    assert capsys.readouterr().out.count("finished") == len(planned)
    # The steps of equal compute follow from the reference's tokens: with other ones they are other trainings.
    with pytest.raises(
        RecipeError, match=r"more.*was measured with other values of recipe\. Delete it to train it again"
    ):
        run_comparison(load_comparison(path, ["methods.rim.search.grounding.max_steps=[1]"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"method": ["pause"]}}, "search: must not hold a key of changes too, got method"),
        ({"search": {"baseline.max_steps": 3}}, "search: must give each key a list of values, got 3 for baseline.max_"),
        ({"search": {"baseline.max_steps": []}}, r"search: must give each key a list of values, got \[\] for"),
        (
            {"search": {"baseline.max_stepz": [3]}},
            r"methods\.answer\.search\.baseline\.max_stepz: unknown key, did you mean max",
        ),
        (
            {"search": {"refinement.max_steps": [3, 4]}},
            "search: values must differ in what the method reads, got refin",
        ),
        ({"search": {"seed": [3, 4]}}, "search: values must differ in what the method reads, got seed=3 and seed=4"),
        (
            {"search": {"baseline.max_steps": [3, 4]}},
            "must not change the tokens of a step if compute",
        ),
        ({"seeds": []}, r"seeds: must hold at least one, or be null for those of all methods, got \[\]"),
    ],
)
def test_searches_that_cannot_be_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    answer = {"changes": {"method": "answer"}, **changes}
    methods = {"rim": {}, "answer": answer, "more": {"changes": {"method": "answer"}, "same_compute_as": "rim"}}
    with pytest.raises(RecipeError, match=message):
        list_runs(load_comparison(write(tmp_path, methods=methods)))


def test_a_methods_own_rows_are_kept_apart_too(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        rows = [{"question": f"{name} {n}", "answer": "red", "steps": ["red"]} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    changes = {"data.path": str(tmp_path), "data.task": "prosqa", "data.options": {}, "model.name_or_path": str(BASE)}
    methods = {"rim": {"search": {"data.train_split": ["train", "test"]}}}
    path = write(tmp_path, changes=changes, test={}, selection={}, methods=methods)
    with pytest.raises(ValueError, match="test: must share no question with the training rows, got 3 of 3"):
        run_comparison(load_comparison(path))


def test_training_rows_that_changed_in_their_file_are_noticed(tmp_path: Path) -> None:
    def spec(word: str) -> dict[str, Any]:
        rows = [{"question": f"train {n}", "answer": word, "steps": [word]} for n in range(3)]
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        comparison = load_comparison(path)
        plan = plan_runs(comparison)
        recipes = check_runs(comparison, plan)
        return load_judged_rows(comparison, shared_recipe(comparison), recipes).spec(comparison, plan[0], recipes[0])

    for name in ("valid", "test"):
        row = {"question": f"{name}", "answer": "red", "steps": ["red"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    changes = {"data.path": str(tmp_path), "data.task": "prosqa", "data.options": {}, "data.validation_rows": 0}
    path = write(tmp_path, changes=changes, test={}, selection={}, methods={"rim": {}})
    first, other, again = spec("red"), spec("blue"), spec("red")
    assert first == again
    assert {key for key in first if first[key] != other[key]} == {"data"}


def test_an_adapter_of_other_rows_is_not_measured_as_one_of_these(tmp_path: Path) -> None:
    def save(split: str, seed: int) -> None:
        rows = itertools.islice(Potions(seed=seed, num_rows=16, num_held_out=8).rows(split), 8)
        name = "valid" if split == "validation" else split
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    for split in ("train", "validation", "test"):
        save(split, 0)
    shared = {f"{stage}.{key}": value for stage in STAGES for key, value in STAGE.items()}
    data = {"data.path": str(tmp_path), "data.task": "prosqa", "data.options": {}, "data.validation_rows": 0}
    measures = {"blocks": False, "budget": [], "controls": False, "faithfulness": False, "representations": False}
    path = write(
        tmp_path,
        changes={**shared, **data, "model.name_or_path": str(BASE)},
        test={},
        selection={},
        methods={"rim": {}},
        measures={**measures, "latency_batch_sizes": [1], "latency_questions": 1},
    )
    run_comparison(load_comparison(path))
    timed = (tmp_path / "out" / "latency.json").read_text()
    save("train", 1)
    with pytest.raises(RecipeError, match=r"measured with other values of data\. Delete it to train it again"):
        run_comparison(load_comparison(path))
    (tmp_path / "out" / "runs" / "rim" / "seed-0" / "measured.json").unlink()
    with pytest.raises(RecipeError, match=r"seed-0 was trained on 8 rows that are not those of data\.path now"):
        run_comparison(load_comparison(path))
    shutil.rmtree(tmp_path / "out" / "runs" / "rim" / "seed-0")
    again = run_comparison(load_comparison(path))
    kept = (tmp_path / "out" / "latency.json").read_text()
    assert kept != timed  # other answers take another time
    assert json.loads(kept)["latency"] == again["latency"]
    run_comparison(load_comparison(path))
    assert (tmp_path / "out" / "latency.json").read_text() == kept


@pytest.mark.slow
def test_two_processes_share_a_comparison(tmp_path: Path) -> None:
    methods = {name: METHODS[name] for name in ("base", "answer", "pause", "rim", "answer-same-compute")}
    measures = {"blocks": False, "budget": [], "controls": False, "faithfulness": False, "representations": False}
    path = write(tmp_path, methods=methods, measures={**measures, "latency_batch_sizes": []})
    code = "import sys; from rim_peft.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "compare", str(path), "--parallel"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1] + outputs[1][1]
    assert all(tables.startswith("# Comparison") for tables, _ in outputs)
    begun = [line.split("] ")[1] for _, log in outputs for line in log.splitlines() if ": training" in line]
    assert sorted(line.partition(",")[0] for line in begun) == sorted(name for name in methods if name != "base")
    shared = json.loads((tmp_path / "out" / "results.json").read_text())
    alone = run_comparison(load_comparison(path, [f"output_dir={tmp_path / 'alone'}"]))
    assert numbers(shared["runs"]) == numbers(alone["runs"])


def test_trials_come_first_whatever_the_order_of_seeds(tmp_path: Path) -> None:
    rates = {"baseline.learning_rate": [1e-3, 1e-4]}
    answer = {"changes": {"method": "answer"}, "search": rates, "seeds": [1, 0]}
    comparison = load_comparison(write(tmp_path, methods={"rim": {}, "answer": answer}, seeds=[0, 1]))
    kinds = [(run.seed, run.is_trial) for run in plan_runs(comparison) if run.name == "answer"]
    assert kinds == [(0, True), (0, True), (0, False), (1, False)]


def test_names_of_values_are_folders_of_their_own() -> None:
    templates = [{"data.prompt_template": text} for text in ("{question} :", "{question}; ", "x" * 400, "x" * 401)]
    names = [name_of(values) for values in templates]
    assert len(set(names)) == 4
    assert all(len(name) < 200 and "/" not in name for name in names)
    assert name_of({"adapter.r": 4}) == "adapter.r=4"
    assert len({name_of({"key": value}) for value in (1, "1", None, "null", True, "true", "a")}) == 7


def test_folders_with_other_values_and_other_processes_are_refused(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    path = folder / "compare.yaml"
    change = "measures.controls=false"
    with pytest.raises(RecipeError, match=r"measured with other values of measures\. Delete measured\.json"):
        run_comparison(load_comparison(path, [change]))
    with pytest.raises(RecipeError, match=r"measured with other values of recipe\. Delete it to train it again"):
        run_comparison(load_comparison(path, ["changes.adapter.lora_alpha=8"]))
    with FileLock(folder / "out" / ".lock"), pytest.raises(BusyError, match="another process works on this comparison"):
        run_comparison(load_comparison(path))
    assert list_runs(load_comparison(path, ["output_dir=elsewhere"])).count("missing") == len(METHODS)
    assert not Path("elsewhere").exists()
    listed = dict(reversed(line.split()[:2]) for line in list_runs(load_comparison(path, [change])).splitlines())
    # The reference alone has controls; another one takes its tokens.
    differing = {name.rstrip(",") for name, state in listed.items() if state == "differs"}
    assert differing == {"rim", "answer-same-compute"}


def test_a_question_cannot_choose_and_decide(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "red", "steps": ["red"]} for n in range(3)]
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    changes = {"data.path": str(tmp_path), "data.task": "prosqa", "data.options": {}, "model.name_or_path": str(BASE)}
    path = write(tmp_path, changes=changes, test={}, selection={}, methods={"rim": {}})
    with pytest.raises(ValueError, match="test: must share no question with the training rows, got 3 of 3"):
        run_comparison(load_comparison(path))
    others = [{**row, "question": f"{row['question']}?"} for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in others))
    with pytest.raises(ValueError, match="test: must share no question with the rows that choose the checkpoint"):
        run_comparison(load_comparison(path))
    with pytest.raises(ValueError, match="test: must share no question with the rows that choose the checkpoint"):
        run_comparison(load_comparison(path, ["changes.data.streaming=true", "changes.data.max_length=null"]))
    with pytest.raises(ValueError, match="selection: must share no question with test, got 3"):
        run_comparison(load_comparison(path, ["changes.data.validation_rows=0"]))


def test_what_would_only_come_out_later_is_said_at_once(tmp_path: Path) -> None:
    twin = {"changes": {"method": "answer", "baseline.max_steps": -1, "baseline.num_train_epochs": 1}}
    methods = {"rim": {}, "answer": twin, "more": {**twin, "same_compute_as": "rim"}}
    with pytest.raises(RecipeError, match=r"methods\.more\.same_compute_as: needs a method with one stage that gives"):
        run_comparison(load_comparison(write(tmp_path, methods=methods)))
    methods = {"rim": {}, "copy": {}, "more": {"same_compute_as": "rim"}}
    with pytest.raises(RecipeError, match="got grounding, refinement"):
        run_comparison(load_comparison(write(tmp_path, methods=methods)))
    methods = {name: METHODS[name] for name in ("answer", "answer-same-compute", "rim")}
    methods["answer"] = {**methods["answer"], "seeds": [1]}
    with pytest.raises(RecipeError, match="needs answer with seed 0 too"):
        run_comparison(load_comparison(write(tmp_path, methods=methods)))


def test_the_command_says_which_kind_a_recipe_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, methods={"rim": {}}, grid={"adapter.num_blocks": [2]})
    assert main(["compare", str(path)]) == 1
    assert "is for rim-peft ablate, since it has a grid" in capsys.readouterr().err
    assert main(["ablate", str(path), "--plan"]) == 0
    assert capsys.readouterr().out.splitlines() == ["missing   rim, seed 0", "missing   adapter.num_blocks=2, seed 0"]
