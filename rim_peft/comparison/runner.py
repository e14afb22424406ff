"""A comparison from its plan to its folder: trains what is missing, measures it, and writes the report."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rim_peft.comparison.measuring import measure_run
from rim_peft.comparison.plan import PlannedRun, check_runs, plan_runs, run_recipe, shared_recipe
from rim_peft.comparison.plots import require_matplotlib
from rim_peft.comparison.report import write_report
from rim_peft.comparison.results import MEASURED, RESULTS, assemble
from rim_peft.comparison.rows import JudgedRows, load_judged_rows
from rim_peft.comparison.sections import Comparison
from rim_peft.comparison.timing import time_methods
from rim_peft.recipe import Recipe, RecipeError
from rim_peft.run import Run, train_or_load
from rim_peft.run.loading import load_untrained
from rim_peft.run.record import write_text

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


class BusyError(RuntimeError):
    """Another process works in the folder."""


def run_comparison(comparison: Comparison, *, command: Sequence[str] = (), parallel: bool = False) -> dict[str, Any]:
    """Make every run that is missing and write results, tables, plots and page to the comparison's folder.

    A run that is finished is not made again; one that was stopped goes on. The same recipe gives the same numbers, but
    for times.

    Args:
        comparison: what to compare.
        command: the command line, for the record.
        parallel: let other processes work on other runs of the same folder; each waits for the others' in the end.

    Returns:
        The results document (``docs/comparison.md``).

    Raises:
        BusyError: another process works in the folder, and ``parallel`` is not set there or here.
        RecipeError: a run's recipe is none, or its folder holds a run with other values.
        Interrupted: a signal stopped a training; the same call goes on.
    """
    started = time.time()
    folder = Path(comparison.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_runs(comparison)
    # All that is wrong is said before anything is trained.
    require_matplotlib()
    recipes = [run_recipe(comparison, run) for run in plan]
    check_runs(comparison, plan, recipes)
    with _locked(folder / ".lock", shared=parallel):
        rows = load_judged_rows(comparison, shared_recipe(comparison))
        progress = _Progress(plan)
        work = _Work(comparison, rows, list(command), progress, parallel)
        left = list(zip(plan, recipes, strict=True))
        while left := [(run, recipe) for run, recipe in left if not work.finish(run, recipe)]:
            time.sleep(_POLL_SECONDS)  # until the others' processes have finished them, or have ended and left them
        with FileLock(folder / ".report.lock"):
            latency = time_methods(comparison, plan, rows)
            results = assemble(comparison, plan, rows, latency=latency, started=started, command=command)
            write_text(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            write_report(results, folder)
    return results


def list_runs(comparison: Comparison) -> str:
    """Return the runs of a comparison, one a line, with what is finished."""
    states = {True: "finished", False: "missing"}
    return "\n".join(f"{states[(run.folder / MEASURED).exists()]:9} {run}" for run in plan_runs(comparison))


@dataclass
class _Work:
    """Makes one run after the other."""

    comparison: Comparison
    rows: JudgedRows
    command: list[str]
    progress: _Progress
    parallel: bool

    def finish(self, run: PlannedRun, recipe: Recipe) -> bool:
        """Make a run unless it is finished; return whether it is finished now, and not another process's."""
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(run.folder.with_name(f".{run.folder.name}.lock"), shared=False):
                if self._is_finished(run, recipe):
                    self.progress.skip(run)
                else:
                    self._make(run, recipe)
        except BusyError:
            if not self.parallel:
                raise
            return False
        return True

    def _is_finished(self, run: PlannedRun, recipe: Recipe) -> bool:
        path = run.folder / MEASURED
        if not path.exists():
            return False
        kept = json.loads(path.read_text(encoding="utf-8"))["spec"]
        if (wanted := self._spec(run, recipe)) != kept:
            differing = sorted(key for key in {**kept, **wanted} if kept.get(key) != wanted.get(key))
            raise RecipeError(
                f"output_dir: {run.folder} was measured with other values of {', '.join(differing)}. Delete "
                f"{path.name} there to measure it anew, or give another output_dir."
            )
        return True

    def _make(self, run: PlannedRun, recipe: Recipe) -> None:
        begun = time.perf_counter()
        self.progress.begin(run, "training" if run.method.train else "the base as it is")
        trained = self._train(run, recipe)
        self.progress.begin(run, "measuring")
        measured = measure_run(self.comparison, run, trained, self.rows)
        measured["spec"] = self._spec(run, recipe)
        measured["seconds"] = round(time.perf_counter() - begun, 1)
        write_text(run.folder / MEASURED, json.dumps(measured, ensure_ascii=False) + "\n")
        self.progress.end(run, measured["seconds"])

    def _train(self, run: PlannedRun, recipe: Recipe) -> Run:
        if not run.method.train:
            return load_untrained(recipe)
        if run.method.view == "compute":
            recipe = run_recipe(self.comparison, run, max_steps=self._steps_of_same_compute(run, recipe))
        return train_or_load(recipe, command=self.command)

    def _steps_of_same_compute(self, run: PlannedRun, recipe: Recipe) -> int:
        """Return the steps that take as many tokens as the reference took, by what the same method took by step."""
        stage: dict[str, Any] = getattr(recipe, recipe.stages[0])
        twin = self.comparison.twin(run.name)
        own, wanted = (self._training(name, run.seed) for name in (twin, run.method.same_compute_as))
        return max(1, math.floor(stage["max_steps"] * wanted["num_tokens"] / own["num_tokens"]))

    def _training(self, name: str | None, seed: int) -> dict[str, Any]:
        path = Path(self.comparison.output_dir) / "runs" / str(name) / f"seed-{seed}" / MEASURED
        if (
            not path.exists()
            and self.parallel
            and any((run.name, run.seed) == (name, seed) for run in self.progress.plan)
        ):
            raise BusyError(f"{path.parent}: another process makes this run, whose tokens are needed.")
        if not path.exists():
            raise RecipeError(f"seeds: {name} must be trained with seed {seed} too, whose tokens are counted. Add it.")
        return json.loads(path.read_text(encoding="utf-8"))["training"]

    def _spec(self, run: PlannedRun, recipe: Recipe) -> dict[str, Any]:
        """Return what decides a run's numbers besides its recipe."""
        return self.rows.spec(self.comparison, run, recipe)


@dataclass
class _Progress:
    """Says what is done now, and about how long the rest takes."""

    plan: list[PlannedRun]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_done: int = 0

    def begin(self, run: PlannedRun, what: str) -> None:
        """Note what begins."""
        logger.info("[%d/%d] %s: %s%s", self.num_done + 1, len(self.plan), run, what, self._left())

    def skip(self, run: PlannedRun) -> None:
        """Count a run that was finished before; its time is that of the time it was made."""
        seconds = json.loads((run.folder / MEASURED).read_text(encoding="utf-8"))["seconds"]
        self.end(run, seconds)

    def end(self, run: PlannedRun, seconds: float) -> None:
        """Count a finished run."""
        self.num_done += 1
        self.seconds.setdefault(run.name, []).append(seconds)

    def _left(self) -> str:
        known = [value for values in self.seconds.values() for value in values]
        if not known:
            return ""
        typical = sum(known) / len(known)
        left = sum(
            sum(self.seconds[run.name]) / len(self.seconds[run.name]) if run.name in self.seconds else typical
            for run in self.plan[self.num_done :]
        )
        return f" (about {left / 60:.0f} min left in all)"


@contextmanager
def _locked(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold a folder's lock, unless processes may share the folder.

    Raises:
        BusyError: another process holds it.
    """
    if shared:
        with _locked(path, shared=False):
            pass  # nobody works here who does not share
        yield
        return
    try:
        with FileLock(path, blocking=False):
            yield
    except Timeout:
        raise BusyError(
            f"{path.parent}: another process works on this comparison. Wait for it, or give --parallel to both."
        ) from None
