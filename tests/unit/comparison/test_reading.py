"""Recipes of comparisons: what is read, what is refused, and which runs follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rim_peft.comparison.plan import plan_runs, run_recipe
from rim_peft.comparison.reading import check_recipe, check_runs, load_comparison
from rim_peft.comparison.sections import update_table
from rim_peft.demo import BASE, RECIPE
from rim_peft.recipe import RecipeError
from rim_peft.run.preflight import Preflight

Write = Callable[..., Path]
RECIPES = Path(__file__).parents[3] / "recipes" / "compare"
SMALL: dict[str, Any] = {
    "output_dir": "out",
    "recipe": str(RECIPE),
    "changes": {"model.name_or_path": str(BASE), "baseline.max_steps": 5},
    "seeds": [0, 1],
    "methods": {
        "base": {"train": False, "changes": {"method": "answer"}},
        "answer": {"label": "LoRA", "changes": {"method": "answer"}},
        "answer-compute": {"changes": {"method": "answer"}, "same_compute_as": "rim"},
        "rim": {},
    },
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(values: Any = None, /, **changes: Any) -> Path:
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **changes} if values is None else values, sort_keys=False))
        return path

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_comparison(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(error.value).splitlines()]


def test_runs_come_seed_by_seed_and_those_of_equal_compute_last(write: Write) -> None:
    comparison = load_comparison(write())
    assert [str(run) for run in plan_runs(comparison)] == [
        "base, seed 0",
        "answer, seed 0",
        "rim, seed 0",
        "answer, seed 1",
        "rim, seed 1",
        "answer-compute, seed 0",
        "answer-compute, seed 1",
    ]
    assert comparison.kind == "compare"
    assert comparison.twin("answer-compute") == "answer"  # not the base, which has the same changes
    assert comparison.looked_into == ["rim"]
    assert (comparison.test.split, comparison.selection.split) == ("test", "validation")


def test_a_run_is_the_shared_recipe_with_its_changes(write: Write) -> None:
    twins = [f"methods.{name}.changes.baseline.max_steps=7" for name in ("answer", "answer-compute")]
    comparison = load_comparison(write(), ["changes.adapter.r=8", *twins])
    runs = {str(run): run for run in plan_runs(comparison)}
    recipe = run_recipe(comparison, runs["answer, seed 1"])
    assert (recipe.method, recipe.seed, recipe.adapter["r"], recipe.baseline["max_steps"]) == ("answer", 1, 8, 7)
    assert Path(recipe.output_dir) == Path("out/runs/answer/seed-1")
    assert run_recipe(comparison, runs["rim, seed 0"]).method == "rim"
    same = run_recipe(comparison, runs["answer-compute, seed 0"], max_steps=9)
    assert same.baseline["max_steps"] == 9


def test_a_grid_changes_one_value_at_a_time(write: Write) -> None:
    path = write(methods={"rim": {}}, grid={"adapter.num_blocks": [1, 2], "adapter.target_modules": [["q_proj"]]})
    comparison = load_comparison(path)
    assert comparison.kind == "ablate"
    assert [(run.name, run.method.changes) for run in plan_runs(comparison) if run.seed == 0] == [
        ("rim", {}),
        ("adapter.num_blocks=1", {"adapter.num_blocks": 1}),
        ("adapter.num_blocks=2", {"adapter.num_blocks": 2}),
        ("adapter.target_modules=_q_proj_-e4dcbcbb", {"adapter.target_modules": ["q_proj"]}),
    ]


def test_some_methods_go_first_into_the_same_folders(write: Write) -> None:
    every, some = (load_comparison(write(), overrides) for overrides in ((), ["only=[rim,answer]", "seeds=[0]"]))
    assert [str(run) for run in plan_runs(some)] == ["answer, seed 0", "rim, seed 0"]  # in the recipe's order
    assert [run for run in plan_runs(every) if str(run) in ("answer, seed 0", "rim, seed 0")] == plan_runs(some)
    grid = load_comparison(write(methods={"rim": {}}, grid={"adapter.r": [1, 2]}, only=["rim", "adapter.r=2"]))
    assert [run.name for run in plan_runs(grid) if run.seed == 0] == ["rim", "adapter.r=2"]


def test_all_problems_are_said_at_once(write: Write) -> None:
    path = write(seedz=[1], methods={"rim": {"chnges": {}}}, measures={"budget": "all"}, recipe=None)
    assert problems(path) == [
        "seedz: unknown key, did you mean seeds?",
        "measures.budget: must be a list (each an integer), got 'all'.",
        "methods.rim.chnges: unknown key, did you mean changes?",
        "recipe: must be given.",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "rin"}, "reference: must be one of the methods, got 'rin'"),
        ({"seeds": []}, "seeds: must hold at least one"),
        ({"methods": {"rim": {}, "a/b": {}}}, "methods: a name must consist of letters, digits"),
        (
            {"methods": {"rim": {}, "x": {"same_compute_as": "y"}}},
            "same_compute_as: must be a method with its own steps",
        ),
        (
            {"methods": {"rim": {}, "x": {"same_compute_as": "rim", "changes": {"method": "cot"}}}},
            "needs a method with the same changes",
        ),
        (
            {"methods": {"rim": {}, "x": {"same_compute_as": "rim", "train": False}}},
            "must be null where train is false",
        ),
        ({"measures": {"of": ["cot"]}}, "measures.of: must hold methods, got 'cot'"),
        ({"measures": {"budget": [-1]}}, "budget: must hold numbers of blocks from 0 on"),
        ({"measures": {"budget": [1, 1]}}, "budget: must hold each entry once, got [1, 1]"),
        ({"measures": {"latency_batch_sizes": [0]}}, "latency_batch_sizes: must hold numbers from 1 on"),
        ({"selection": {"split": "test"}}, "selection.split: must differ from test.split"),
        ({"test": {"rows": 0}}, "rows: must be at least 1 or null"),
        ({"only": ["rim", "rin"]}, "only: must hold methods, got 'rin'. There are base, answer, answer-compute, rim."),
        ({"only": ["answer"]}, "only: must hold rim, which is the reference, got answer. Add it."),
        ({"only": ["rim", "answer-compute"]}, "only: must hold answer, which is what answer-compute takes tokens from"),
        ({"only": ["rim"], "measures": {"of": ["answer"]}}, "only: must hold answer, which is in measures.of, got rim"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, write: Write) -> None:
    assert message in "\n".join(problems(write(**changes)))


def test_overrides_and_broken_files(write: Write, tmp_path: Path) -> None:
    assert load_comparison(write(), ["seeds=[7]", "measures.controls=false"]).measures.controls is False
    ablation = load_comparison(write(grid={"adapter.r": [8]}), ["grid.adapter.r=[4]", "grid.seed=[1]"])
    assert ablation.grid == {"adapter.r": [4], "seed": [1]}
    assert "command line: must read" in problems(write(), "seeds")[0].replace("seeds: ", "")
    assert problems(write([1, 2])) == ["must hold keys with values, such as 'recipe: recipes/gsm8k/tiny.yaml'."]
    comparison = load_comparison(write(), ["changes.adapter.num_blcks=3"])
    with pytest.raises(RecipeError, match="did you mean"):
        run_recipe(comparison, plan_runs(comparison)[0])


@pytest.mark.parametrize(
    ("changes", "overrides", "line"),
    [
        (
            {"changes": {**SMALL["changes"], "adapter.num_blcks": 3}},
            [],
            "{path}: changes.adapter.num_blcks: unknown key, did you mean num_blocks?",
        ),
        (
            {},
            ["changes.adapter.num_blcks=3"],
            "command line: changes.adapter.num_blcks: unknown key, did you mean num_blocks?",
        ),
        (
            {"methods": {"rim": {"changes": {"adapter.r": -1}}}},
            [],
            "{path}: methods.rim.changes.adapter.r: must be an integer of at least 0, got -1.",
        ),
        (
            {"methods": {"rim": {"search": {"adapter.r": [8, -1]}}}},
            [],
            "{path}: methods.rim.search.adapter.r: must be an integer of at least 0, got -1.",
        ),
        (
            {"methods": {"rim": {}}, "grid": {"adapter.r": [8, -1]}},
            [],
            "{path}: grid.adapter.r: must be an integer of at least 0, got -1.",
        ),
        ({"methods": {"rim": {"changes": {1: 2}}}}, [], "{path}: methods.rim.changes.1: unknown key."),
        ({"seeds": [-1]}, [], "{path}: seeds: must be from 0 to 4294967295, got -1."),
        (
            {"test": {"split": "test", "options": {"sed": 1}}},
            [],
            "{path}: test.options.sed: unknown key, did you mean seed?",
        ),
        (
            {"selection": {"split": "validation", "options": {"lengths": "a"}}},
            [],
            "{path}: selection.options.lengths: must be a list (each an integer), got 'a'.",
        ),
    ],
)
def test_problems_stand_under_their_own_file_and_key(
    changes: dict[str, Any], overrides: list[str], line: str, write: Write
) -> None:
    path = write(**changes)
    comparison = load_comparison(path, overrides)
    with pytest.raises(RecipeError) as error:
        check_runs(comparison, plan_runs(comparison))
    assert str(error.value) == line.format(path=path)


def test_a_shared_recipe_that_is_missing_is_named(write: Write) -> None:
    path = write(recipe="none.yaml")
    assert check_recipe(path, [], Preflight()).errors[0].startswith(f"{path}: recipe: must be a file, got 'none.yaml'")


def test_the_documentation_is_in_step() -> None:
    text = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert update_table(text) == text, "run: python -m rim_peft.comparison.sections docs/recipes.md"
    assert "methods.NAME.same_compute_as" in text


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_comparison_of_the_repository_is_good(path: Path) -> None:
    comparison = load_comparison(path)
    plan = plan_runs(comparison)
    check_runs(comparison, plan)
    for run in plan:
        if run.values is not None:  # those of others are not chosen yet
            assert run_recipe(comparison, run).stage_trainers()
    text = path.read_text(encoding="utf-8").partition("output_dir:")[0]
    command = f"# Command: rim-peft {comparison.kind} recipes/compare/{path.name}"
    for heading in ("# Purpose: ", command, "# Hardware: ", "# Expected: "):
        assert heading in text
