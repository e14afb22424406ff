"""A comparison's recipe → the runs that it needs, in the order in which they can be made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_peft.comparison.sections import Comparison, MethodOptions
from rim_peft.recipe import Recipe, RecipeError, load_recipe


@dataclass(frozen=True)
class PlannedRun:
    """One training, or the base as it is, with one seed.

    Attributes:
        name: the method's name.
        seed: seed of the training.
        method: in what it differs from the shared recipe.
        folder: where it lies.
    """

    name: str
    seed: int
    method: MethodOptions
    folder: Path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def plan_runs(comparison: Comparison) -> list[PlannedRun]:
    """List the runs: seed by seed, so that one seed of all methods is there first, those with equal compute last."""
    entries = comparison.entries()
    runs = [
        PlannedRun(name, seed, method, Path(comparison.output_dir) / "runs" / name / f"seed-{seed}")
        for seed in dict.fromkeys([*comparison.seeds, *(s for m in entries.values() for s in m.seeds or ())])
        for name, method in entries.items()
        if seed in _seeds(comparison, method)
    ]
    return sorted(runs, key=lambda run: run.method.view == "compute")


def shared_recipe(comparison: Comparison) -> Recipe:
    """Return the recipe that all runs share, with the changes for all of them."""
    changes = {**comparison.changes, "output_dir": comparison.output_dir}
    return load_recipe(comparison.recipe, overrides(changes))


def check_runs(comparison: Comparison, runs: Sequence[PlannedRun], recipes: Sequence[Recipe]) -> None:
    """Say what would only come out after others have trained.

    Raises:
        RecipeError: compute is to be equal for a method of several stages or without ``max_steps``, or with a seed that
            the methods it depends on don't have.
    """
    there = {(run.name, run.seed) for run in runs}
    for run, recipe in zip(runs, recipes, strict=True):
        if run.method.view == "samples":
            continue
        key = f"methods.{run.name}.same_compute_as"
        steps = getattr(recipe, recipe.stages[0]).get("max_steps", -1)
        if len(recipe.stages) != 1 or steps < 1:
            raise RecipeError(
                f"{key}: needs a method with one stage that gives max_steps, got {', '.join(recipe.stages)} with "
                f"max_steps {steps}. Give it."
            )
        for name in (run.method.same_compute_as, comparison.twin(run.name)):
            if (name, run.seed) not in there:
                raise RecipeError(f"{key}: needs {name} with seed {run.seed} too, whose tokens count. Add the seed.")


def run_recipe(comparison: Comparison, run: PlannedRun, *, max_steps: int | None = None) -> Recipe:
    """Return the recipe of one run.

    Args:
        comparison: the whole.
        run: one of its runs.
        max_steps: steps of the method's one stage, where they are not the recipe's.

    Raises:
        RecipeError: the shared recipe with the run's changes is no recipe.
    """
    changes = {
        **comparison.changes,
        **run.method.changes,
        "output_dir": str(run.folder),
        "seed": run.seed,
    }
    recipe = load_recipe(comparison.recipe, overrides(changes))
    if max_steps is None:
        return recipe
    (stage,) = recipe.stages
    return load_recipe(comparison.recipe, overrides({**changes, f"{stage}.max_steps": max_steps}))


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """Return changes as on the command line.

    >>> overrides({"grounding": None, "refinement.learning_rate": 3e-3})
    ['grounding=null', 'refinement.learning_rate=0.003']
    """
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def _seeds(comparison: Comparison, method: MethodOptions) -> list[int]:
    if method.seeds is not None:
        return method.seeds
    return comparison.seeds if method.train else comparison.seeds[:1]
