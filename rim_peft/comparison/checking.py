"""What would only come out after others have trained, said before the first one does."""

from __future__ import annotations

from collections.abc import Sequence

from rim_peft.comparison.plan import PlannedRun, run_recipe
from rim_peft.comparison.rows import recipe_hash
from rim_peft.comparison.sections import Comparison, name_of
from rim_peft.recipe import Recipe, RecipeError
from rim_peft.recipe.checks import check_task_options
from rim_peft.recipe.problems import Problems

KEEP_TOKENS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay"),
    *("max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "dropout"),
)
"""Options of a stage that leave the tokens of a step as they are."""


def check_runs(comparison: Comparison, plan: Sequence[PlannedRun]) -> list[Recipe]:
    """Return the recipes of all trainings whose values are known; trials stand for the runs chosen from them.

    Raises:
        RecipeError: runs' recipes are none, one line for each problem; two trials are the same training; or compute
            is to be equal where it cannot be.
    """
    known: list[tuple[PlannedRun, Recipe]] = []
    problems: list[str] = []
    for run in plan:
        if run.values is None:
            continue
        try:
            known.append((run, run_recipe(comparison, run)))
        except RecipeError as error:
            problems += str(error).splitlines()
    if known and not problems:
        problems = _check_rows(comparison, known[0][1])
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    trials: dict[tuple[str, str], PlannedRun] = {}
    for run, recipe in known:
        if run.is_trial and (other := trials.setdefault((run.name, recipe_hash(recipe)), run)) is not run:
            alike = " and ".join(name_of(trial.values or {}) for trial in (other, run))
            where = comparison.where(f"methods.{run.name}.search")
            raise RecipeError(
                f"{where}: values must differ in what the method reads, got {alike}, which train alike. Take one of "
                "them out."
            )
    for run, recipe in known:
        if run.method.view == "compute":
            _check_compute(comparison, run, recipe)
    there = {(run.name, run.seed) for run in plan}
    for run in plan:
        for name in (run.method.same_compute_as, comparison.twin(run.name)) if run.method.view == "compute" else ():
            if (name, run.seed) not in there:
                where = comparison.where(f"methods.{run.name}.same_compute_as")
                raise RecipeError(f"{where}: needs {name} with seed {run.seed} too, whose tokens count. Add the seed.")
    return [recipe for run, recipe in known if run.method.train]


def _check_rows(comparison: Comparison, recipe: Recipe) -> list[str]:
    """Return what is wrong with the task's options in the sections of judged rows."""
    problems = Problems("", list)
    for section in ("test", "selection"):
        own = getattr(comparison, section).options
        problems.overridden = {f"{section}.options": comparison.where(f"{section}.options")}
        check_task_options(f"{section}.options", recipe.data.task, own, problems, others=recipe.data.options)
    return problems.lines


def _check_compute(comparison: Comparison, run: PlannedRun, recipe: Recipe) -> None:
    """Refuse a method whose number of steps cannot be taken from its twin's tokens for each step."""
    steps = getattr(recipe, recipe.stages[0]).get("max_steps", -1)
    if len(recipe.stages) != 1 or steps < 1:
        where = comparison.where(f"methods.{run.name}.same_compute_as")
        raise RecipeError(
            f"{where}: needs a method with one stage that gives max_steps, got "
            f"{', '.join(recipe.stages)} with max_steps {steps}. Give it."
        )
    for name in (run.name, comparison.twin(run.name)):
        for key in comparison.methods[str(name)].search:
            if key.rpartition(".")[2] not in KEEP_TOKENS:
                where = comparison.where(f"methods.{name}.search.{key}")
                raise RecipeError(
                    f"{where}: must leave the tokens of a step as they are where compute is to be equal, "
                    f"got {key}. Search {', '.join(KEEP_TOKENS)} alone, or compare by samples."
                )
