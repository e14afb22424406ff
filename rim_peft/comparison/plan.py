"""Turn a comparison's recipe into its runs, in an order in which they can be made."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rim_peft.comparison.sections import Comparison, MethodOptions, name_of
from rim_peft.recipe import Recipe, load_recipe
from rim_peft.tuner.files import read_object


@dataclass(frozen=True)
class PlannedRun:
    """One training, or the untrained base, with one seed.

    Attributes:
        name: the method's name.
        seed: seed of the training.
        method: how it differs from the shared recipe.
        parent: folder of the method's runs.
        values: values of the searched keys; None until they are chosen, empty if nothing is searched.
        is_trial: whether it is judged on the selection rows to choose these values.
    """

    name: str
    seed: int
    method: MethodOptions
    parent: Path
    values: Mapping[str, Any] | None
    is_trial: bool = False

    @property
    def folder(self) -> Path:
        """The run's folder; a run with the values of a trial shares the trial's, and is trained once."""
        if self.values is None:
            raise ValueError(f"{self}: must have been chosen from its trials before it has a folder.")
        return self.parent / name_of(self.values) / f"seed-{self.seed}"

    @property
    def record(self) -> Path:
        """File with the run's results; the run is finished if it exists."""
        return self.folder / ("tried.json" if self.is_trial else "measured.json")

    def __str__(self) -> str:
        trial = f", trying {name_of(self.values)}" if self.is_trial and self.values else ""
        return f"{self.name}, seed {self.seed}{trial}"


def plan_runs(comparison: Comparison) -> list[PlannedRun]:
    """List the runs in an order in which each has what it needs.

    Seed by seed, so that one seed of all methods is finished early; a method's trials before its runs; runs with equal
    compute last.
    """
    entries = comparison.entries()
    runs: list[PlannedRun] = []
    for seed in dict.fromkeys([*comparison.seeds, *(s for m in entries.values() for s in m.seeds or ())]):
        for name, method in entries.items():
            if seed in _seeds(comparison, method):
                parent = Path(comparison.output_dir) / "runs" / name
                run = PlannedRun(name, seed, method, parent, None if method.search else {})
                runs += [run] if trials_of(runs, run) else [*_trials(run), run]
    return sorted(runs, key=lambda run: run.method.view == "compute")


def _trials(run: PlannedRun) -> Iterator[PlannedRun]:
    """Yield a trial of each combination of searched values with the run's seed; none if nothing is searched."""
    if run.values is None:
        for values in itertools.product(*run.method.search.values()):
            yield replace(run, values=dict(zip(run.method.search, values, strict=True)), is_trial=True)


def trials_of(plan: Sequence[PlannedRun], run: PlannedRun) -> list[PlannedRun]:
    """Return the trials that a run's values are chosen from."""
    return [other for other in plan if other.name == run.name and other.is_trial]


def chosen(plan: Sequence[PlannedRun], run: PlannedRun) -> PlannedRun:
    """Return a run with the values of its best trial, the first of equally good ones.

    Raises:
        FileNotFoundError: a trial is unfinished.
    """
    if run.values is not None:
        return run
    best = max(trials_of(plan, run), key=lambda trial: read_record(trial)["score"]["accuracy"])
    return replace(run, values=best.values)


def read_record(run: PlannedRun) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        FileNotFoundError: it is unfinished.
        ValueError: the file is damaged.
    """
    return read_object(run.record, keys=("spec", "seconds"), remedy="Delete it: the run is then measured again.")


def shared_recipe(comparison: Comparison) -> Recipe:
    """Return the recipe that all runs share, with the changes common to all of them."""
    changes = {**comparison.changes, "output_dir": comparison.output_dir}
    return load_recipe(comparison.recipe, overrides(changes), places=_places(comparison))


def run_recipe(comparison: Comparison, run: PlannedRun, *, max_steps: int | None = None) -> Recipe:
    """Return the recipe of one run.

    Args:
        comparison: the whole comparison.
        run: one of its runs.
        max_steps: steps of the method's only stage, if they differ from the recipe's.

    Raises:
        RecipeError: the shared recipe with the run's changes is invalid.
    """
    if run.values is None:
        raise ValueError(f"{run}: must have been chosen from its trials before it has a recipe.")
    changes = {
        **comparison.changes,
        **run.method.changes,
        **run.values,
        "output_dir": str(run.folder),
        "seed": run.seed,
    }
    places = _places(comparison, run)
    recipe = load_recipe(comparison.recipe, overrides(changes), places=places)
    if max_steps is None:
        return recipe
    (stage,) = recipe.stages
    return load_recipe(comparison.recipe, overrides({**changes, f"{stage}.max_steps": max_steps}), places=places)


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """Return changes in the form of command line overrides.

    >>> overrides({"grounding": None, "refinement.learning_rate": 3e-3})
    ['grounding=null', 'refinement.learning_rate=0.003']
    """
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def _places(comparison: Comparison, run: PlannedRun | None = None) -> dict[str, str]:
    """Return where the comparison's recipe sets the keys of a run's changes."""
    places = {key: comparison.where(f"changes.{key}") for key in comparison.changes}
    places["output_dir"] = comparison.where("output_dir")
    if run is not None:
        is_method = run.name in comparison.methods
        for key in run.method.changes:
            places[key] = comparison.where(f"methods.{run.name}.changes.{key}" if is_method else f"grid.{key}")
        for key in run.values or {}:
            places[key] = comparison.where(f"methods.{run.name}.search.{key}")
        places["seed"] = comparison.where("seeds" if run.method.seeds is None else f"methods.{run.name}.seeds")
    return places


def _seeds(comparison: Comparison, method: MethodOptions) -> list[int]:
    if method.seeds is not None:
        return method.seeds
    return comparison.seeds if method.train else comparison.seeds[:1]
