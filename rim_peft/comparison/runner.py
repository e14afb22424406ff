"""Run a comparison: train what is missing, measure it, and write the report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rim_peft.comparison.document import RESULTS, assemble
from rim_peft.comparison.measuring import judge_trial, measure_run
from rim_peft.comparison.plan import PlannedRun, chosen, plan_runs, read_record, run_recipe, shared_recipe, trials_of
from rim_peft.comparison.plots import require_matplotlib
from rim_peft.comparison.questions import show_questions
from rim_peft.comparison.reading import check_runs
from rim_peft.comparison.report import write_report
from rim_peft.comparison.rows import JudgedRows, load_judged_rows
from rim_peft.comparison.sections import Comparison
from rim_peft.comparison.timing import time_methods
from rim_peft.escaping import json_text
from rim_peft.evaluation.probe import import_sklearn
from rim_peft.recipe import Recipe, RecipeError
from rim_peft.run import Run, train_or_load
from rim_peft.run.loading import RECORD_FILE, load_untrained
from rim_peft.training.files import write_text
from rim_peft.training.interruption import Interrupted
from rim_peft.tuner.files import check_folder_path

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_LOOK_SECONDS = 5.0


class BusyError(RuntimeError):
    """Another process is working in the folder."""


def run_comparison(comparison: Comparison, *, command: Sequence[str] = (), parallel: bool = False) -> dict[str, Any]:
    """Make all missing runs, and write results, tables, plots and page to the comparison's folder.

    Finished runs are kept, and stopped ones are resumed. The same recipe gives the same figures, except times.

    Args:
        comparison: what to compare.
        command: the command line, for the record.
        parallel: let other processes work on other runs of the same folder; each waits for the others at the end.

    Returns:
        The results document (``docs/comparison.md``).

    Raises:
        BusyError: another process is working in the folder, and not both have ``parallel``.
        RecipeError: a run's recipe is invalid, or its folder holds a run with other values.
        Interrupted: a signal stopped a training; call this again to resume.
    """
    started = time.time()
    folder = Path(comparison.output_dir)
    check_folder_path("output_dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_runs(comparison)
    # Report all errors before anything is trained.
    require_matplotlib()
    if comparison.measures.blocks:
        import_sklearn()
    recipes = check_runs(comparison, plan)
    with _locked(folder / ".lock", shared=parallel):
        rows = load_judged_rows(comparison, shared_recipe(comparison), recipes)
        progress = _Progress(plan)
        work = _Work(comparison, rows, list(command), progress, parallel)
        left = plan
        while left := [run for run in left if not work.finish(run)]:
            if work.is_waiting:
                time.sleep(_POLL_SECONDS)  # until other processes finish or release these runs
            else:
                logger.info("waiting for other processes: %s", "; ".join(str(run) for run in left))
                work.is_waiting = True
        finished = [chosen(plan, run) for run in plan]
        with FileLock(folder / ".report.lock"):
            latency = time_methods(comparison, [run for run in finished if not run.is_trial], rows)
            results = assemble(comparison, finished, rows, latency=latency, started=started, command=command)
            write_text(folder / RESULTS, json_text(results, indent=1) + "\n")
            write_report(results, folder, questions=show_questions(comparison, finished, rows))
    return results


def list_runs(comparison: Comparison) -> str:
    """Return the runs of a comparison, one per line: finished, missing, or differs (made with other values).

    Raises:
        ValueError: as for :func:`run_comparison`, before it trains.
    """
    plan = plan_runs(comparison)
    rows = load_judged_rows(comparison, shared_recipe(comparison), check_runs(comparison, plan))
    work = _Work(comparison, rows, [], _Progress(plan), parallel=False)
    return "\n".join(f"{work.state(run):9} {run}" for run in plan)


@dataclass
class _Work:
    """Makes runs one after the other."""

    comparison: Comparison
    rows: JudgedRows
    command: list[str]
    progress: _Progress
    parallel: bool
    is_waiting: bool = False

    def finish(self, run: PlannedRun) -> bool:
        """Make a run unless it is finished; return False if another process is working on it."""
        try:
            run = self._known(run)
            recipe = self._recipe(run)
            run.folder.mkdir(parents=True, exist_ok=True)
            with _locked(run.folder.with_name(f".{run.folder.name}.lock"), shared=False):
                if self._is_finished(run, recipe):
                    self.progress.skip(run)
                else:
                    self.is_waiting = False
                    self._make(run, recipe)
        except BusyError:
            if not self.parallel:
                raise
            return False
        return True

    def state(self, run: PlannedRun) -> str:
        """Return whether a run, including the runs that it needs, is finished, differs or is missing."""
        for other in self._needed(run):
            if (state := self.state(other)) != "finished":
                return state
        try:
            run = self._known(run)
            return "finished" if self._is_finished(run, self._recipe(run)) else "missing"
        except BusyError:
            return "missing"
        except RecipeError:
            return "differs"

    def _needed(self, run: PlannedRun) -> list[PlannedRun]:
        """Return the runs that a run takes values or token counts from."""
        plan = self.progress.plan
        needed = trials_of(plan, run) if run.values is None else []
        if run.method.view == "compute":
            names = (self.comparison.twin(run.name), run.method.same_compute_as)
            needed += [other for other in plan if not other.is_trial and other.name in names and other.seed == run.seed]
        return needed

    def _is_finished(self, run: PlannedRun, recipe: Recipe) -> bool:
        if not run.record.exists():
            return False
        kept = read_record(run)["spec"]
        if (wanted := self.rows.spec(self.comparison, run, recipe)) != kept:
            differing = sorted(key for key in {**kept, **wanted} if kept.get(key) != wanted.get(key))
            other_rows = kept["data"].get("train") != wanted["data"]["train"]
            is_other_training = other_rows or {"recipe", "base"} & {*differing}
            remedy = "it to train it" if is_other_training else f"{run.record.name} there to measure it"
            raise RecipeError(
                f"output_dir: {run.folder} was measured with other values of {', '.join(differing)}. Delete {remedy} "
                "again, or give another output_dir."
            )
        return True

    def _make(self, run: PlannedRun, recipe: Recipe) -> None:
        begun = time.perf_counter()
        self.progress.begin(run, "training" if run.method.train else "the base as it is")
        try:
            trained = self._train(run, recipe) if run.method.train else load_untrained(recipe)
            self.progress.begin(run, "measuring")
            measure = judge_trial if run.is_trial else measure_run
            found = measure(self.comparison, run, trained, self.rows)
        except Exception as error:
            if not isinstance(error, Interrupted):
                logger.error("%s: stopped by an error", run)
            raise
        found["spec"] = self.rows.spec(self.comparison, run, recipe)
        found["seconds"] = round(time.perf_counter() - begun, 1)
        write_text(run.record, json_text(found) + "\n")
        self.progress.end(run, found["seconds"])

    def _train(self, run: PlannedRun, recipe: Recipe) -> Run:
        """Train, or load a finished training if it used the current rows."""
        trained = train_or_load(recipe, command=self.command)
        rows, used = self.rows.trained_on(recipe), trained.record.get("data", {}).get("train")
        if not isinstance(used, dict):
            raise RecipeError(
                f"output_dir: {run.folder / RECORD_FILE} must say what the run was trained on (data.train), and does "
                "not. Put back a copy, or delete the folder to train it again."
            )
        if rows is not None and rows != used:
            raise RecipeError(
                f"output_dir: {run.folder} was trained on {used['num_rows']} rows that are not those of data.path now. "
                "Delete it to train it again, or give another output_dir."
            )
        return trained

    def _recipe(self, run: PlannedRun) -> Recipe:
        """Return a run's recipe, with the number of steps for equal compute."""
        recipe = run_recipe(self.comparison, run)
        if run.method.view == "samples":
            return recipe
        return run_recipe(self.comparison, run, max_steps=self._steps_of_same_compute(run, recipe))

    def _steps_of_same_compute(self, run: PlannedRun, recipe: Recipe) -> int:
        """Return the steps with as many tokens as the reference took, from the tokens per step of the method's twin."""
        stage: dict[str, Any] = getattr(recipe, recipe.stages[0])
        twin = self.comparison.twin(run.name)
        own, wanted = (self._training(name, run.seed) for name in (twin, run.method.same_compute_as))
        return max(1, math.floor(stage["max_steps"] * wanted["num_tokens"] / own["num_tokens"]))

    def _training(self, name: str | None, seed: int) -> dict[str, Any]:
        plan = self.progress.plan
        run = next(run for run in plan if (run.name, run.seed, run.is_trial) == (name, seed, False))
        with self._others_may_make():
            training: dict[str, Any] = read_record(chosen(plan, run))["training"]
        return training

    def _known(self, run: PlannedRun) -> PlannedRun:
        """Return the run with its values."""
        with self._others_may_make():
            return chosen(self.progress.plan, run)

    @contextmanager
    def _others_may_make(self) -> Iterator[None]:
        """Turn a needed but unfinished run, which only another process can be making, into one to wait for."""
        try:
            yield
        except FileNotFoundError as missing:
            raise BusyError(f"{missing.filename}: another process is making this run, which is needed.") from None


@dataclass
class _Progress:
    """Logs the current work and the estimated remaining time."""

    plan: list[PlannedRun]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_done: int = 0

    def begin(self, run: PlannedRun, what: str) -> None:
        """Log the start of a piece of work."""
        logger.info("[%d/%d] %s: %s%s", self.num_done + 1, len(self.plan), run, what, self._left())

    def skip(self, run: PlannedRun) -> None:
        """Count a run finished earlier, with the time that it took then."""
        self.end(run, read_record(run)["seconds"])

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
    try:
        # A process that shares the folder only checks that no exclusive one works here; others may be checking too.
        with FileLock(path, timeout=_LOOK_SECONDS if shared else 0):
            if not shared:
                yield
                return
    except Timeout:
        raise BusyError(
            f"{path.parent}: another process works on this comparison. Wait for it, or give --parallel to both."
        ) from None
    yield
