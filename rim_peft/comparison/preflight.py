"""A recipe of either kind, a run's or a comparison's, looked at before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rim_peft.comparison.checking import KEEP_TOKENS, check_runs
from rim_peft.comparison.plan import plan_runs, run_recipe
from rim_peft.comparison.reading import load_comparison
from rim_peft.methods import METHODS
from rim_peft.recipe import Recipe, RecipeError, load_recipe
from rim_peft.recipe.reading import read_mapping
from rim_peft.recipe.snapshot import resolve
from rim_peft.run.findings import RunFindings
from rim_peft.run.preflight import Preflight
from rim_peft.run.training import check_folder

_NOT_MEMORY = {*KEEP_TOKENS, "hold", "schedule", "reset_optimizer"} - {"optim", "dropout"}
"""Options of a stage that change neither its rows nor its memory."""


@dataclass
class CheckedRecipe:
    """What was found of a recipe.

    Attributes:
        path: the file.
        runs: findings by the names of the methods that they are of; one with no name for the recipe of a run.
        errors: what is wrong with the file itself.
    """

    path: str
    runs: dict[str, RunFindings] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether nothing is known that would stop it."""
        return not self.errors and not any(run.errors for run in self.runs.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        runs = [{"methods": name.split(", ") if name else [], **run.to_dict()} for name, run in self.runs.items()]
        return {"recipe": self.path, "ok": self.is_ok, "errors": self.errors, "runs": runs}


def check_recipe(path: str | Path, overrides: Sequence[str], preflight: Preflight) -> CheckedRecipe:
    """Look at a recipe, or at every run of a comparison that differs from the others in rows or memory.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each, which win over the file.
        preflight: how to look.
    """
    checked = CheckedRecipe(str(path))
    try:
        for name, recipe in _distinct_runs(path, overrides).items():
            checked.runs[name] = preflight.check(recipe)
            if not name:  # a comparison goes on in the folder that it finds
                folder = Path(recipe.output_dir)
                checked.runs[name].attempt("output folder", partial(check_folder, folder, recipe))
    except RecipeError as error:
        checked.errors = str(error).splitlines()
    except (OSError, UnicodeError) as error:
        name = str(getattr(error, "filename", None) or path)  # a comparison names the recipe that its runs share
        checked.errors = [f"{name}: {getattr(error, 'strerror', None) or error}"]
    return checked


def _distinct_runs(path: str | Path, overrides: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes that a file stands for, by the names of the methods that share them.

    A method with another's compute has the recipe of its twin, but for a number of steps that is not known yet.
    """
    keys = read_mapping(path, example="output_dir: outputs/run")
    if "distributed_type" in keys:
        raise RecipeError(
            f"{path}: must be a recipe, got a file of accelerate's. Give it to accelerate launch --config_file, and "
            "check the recipe."
        )
    if "recipe" not in keys:
        return {"": load_recipe(path, overrides)}
    comparison = load_comparison(path, overrides)
    plan = plan_runs(comparison)
    check_runs(comparison, plan)
    names: dict[str, list[str]] = {}
    recipes: dict[str, Recipe] = {}
    for run in plan:
        if run.method.train and run.method.view == "samples" and run.values is not None:
            recipe = run_recipe(comparison, run)
            key = _key(recipe)
            recipes.setdefault(key, recipe)
            if run.name not in names.setdefault(key, []):
                names[key].append(run.name)
    return {", ".join(names[key]): recipe for key, recipe in recipes.items()}


def _key(recipe: Recipe) -> str:
    """Return what a recipe's rows and memory follow from."""
    values = resolve(recipe)
    stages = {
        stage: {key: value for key, value in values[stage].items() if key not in _NOT_MEMORY and "_steps" not in key}
        for stage in recipe.stages
    }
    others = {stage for method in METHODS.values() for stage in method.stages}
    kept = {key: value for key, value in values.items() if key not in {*others, "output_dir", "seed", "evaluation"}}
    return json.dumps({**kept, **stages}, sort_keys=True)
