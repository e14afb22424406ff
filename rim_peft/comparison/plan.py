"""A comparison's recipe → the runs that it needs, in the order in which they can be made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_peft.comparison.sections import Comparison, MethodOptions
from rim_peft.recipe import Recipe, load_recipe


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
