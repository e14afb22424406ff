"""Read a :class:`Comparison` from YAML and ``key=value``, and check all of it before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from rim_peft.comparison.plan import PlannedRun, plan_runs, run_recipe
from rim_peft.comparison.rows import recipe_hash
from rim_peft.comparison.sections import Comparison, MeasureOptions, MethodOptions, RowsOptions, name_of
from rim_peft.methods import METHODS
from rim_peft.recipe import Recipe, RecipeError, load_recipe
from rim_peft.recipe.checks import check_task_options
from rim_peft.recipe.problems import Problems, join, on_command_line
from rim_peft.recipe.reading import check_leaves, read_mapping, read_overrides, resolve
from rim_peft.recipe.schema import fields_schema, key_references, recipe_schema
from rim_peft.recipe.syntax import hints_of
from rim_peft.run.findings import RunFindings
from rim_peft.run.output_folder import check_folder
from rim_peft.run.preflight import Preflight
from rim_peft.values import shown

SECTIONS: dict[str, type] = {"test": RowsOptions, "selection": RowsOptions, "measures": MeasureOptions}


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read the recipe of a comparison, and check everything that needs neither models nor rows.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each; they take precedence over the file.

    Raises:
        RecipeError: the recipe is invalid, with one line for each problem.
        OSError: the file cannot be read.
    """
    values = read_mapping(path, example="recipe: recipes/gsm8k/tiny.yaml")
    problems = Problems(str(path), _all_keys)
    given = read_overrides(overrides, problems)
    problems.overridden = on_command_line(key for key, _ in given)
    for key, value in given:
        _set(values, key.split("."), value)
    check_leaves(values, problems)
    comparison = _read(values, problems)
    problems.raise_any()
    if comparison is None:
        raise RecipeError(f"{path}: cannot be read.")
    return comparison


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a key in nested values; inside ``changes``, ``search`` and ``grid`` the rest of the path is a single key."""
    for depth, name in enumerate(path[:-1]):
        if name in ("changes", "search") or (name == "grid" and depth == 0):
            values[name] = {**(values.get(name) or {}), ".".join(path[depth + 1 :]): value}
            return
        inside = values.get(name)
        values[name] = dict(inside) if isinstance(inside, dict) else {}
        values = values[name]
    values[path[-1]] = value


def _read(values: dict[str, Any], problems: Problems) -> Comparison | None:
    problems.check_keys("", values, [field.name for field in Comparison.options()])
    read: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        default = {"split": "validation"} if name == "selection" else {"split": "test"} if name == "test" else {}
        read[name] = _read_section(name, section, {**default, **_mapping(name, values.get(name), problems)}, problems)
    read["methods"] = {}
    for name, entry in _mapping("methods", values.get("methods"), problems).items():
        key = f"methods.{name}"
        read["methods"][str(name)] = _read_section(key, MethodOptions, _mapping(key, entry, problems), problems)
    hints = {name: hint for name, hint in hints_of(Comparison).items() if name not in (*read, "where")}
    top = problems.convert("", hints, {name: value for name, value in values.items() if name in hints})
    for name in ("output_dir", "recipe"):
        if not top.get(name):
            problems.add(name, "must be given.")
    if top.get("recipe") and not Path(top["recipe"]).is_file():
        problems.add("recipe", f"must be a file, got {shown(top['recipe'])}, which is not a file in {Path.cwd()}.")
    if problems.lines:
        return None
    return problems.build("", Comparison, {**top, **read, "where": problems.where})


def _mapping(name: str, value: Any, problems: Problems) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return dict(value or {})
    problems.add(name, f"must be a section with keys, got {shown(value)}.")
    return {}


def _read_section(name: str, section: type, values: dict[str, Any], problems: Problems) -> Any:
    problems.check_keys(name, values, [option.name for option in fields(section)])
    converted = problems.convert(name, hints_of(section), values)
    for option in fields(section):
        is_needed = option.default is MISSING and option.default_factory is MISSING
        if is_needed and converted.get(option.name) is None:
            problems.add(join(name, option.name), "must be given.")
            return None
    return problems.build(name, section, converted)


def file_schema() -> dict[str, Any]:
    """Return the JSON schema of what :func:`check_recipe` takes: comparisons, which name a recipe, and recipes."""
    recipe = recipe_schema()
    changes = {"changes": {"type": "object", "properties": key_references(recipe)}}
    methods = {"type": "object", "additionalProperties": fields_schema(MethodOptions, fields(MethodOptions), changes)}
    sections = {name: fields_schema(section, fields(section)) for name, section in SECTIONS.items()}
    comparison = fields_schema(Comparison, Comparison.options(), {**sections, **changes, "methods": methods})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"recipe": recipe},
        "if": {"required": ["recipe"]},
        "then": {**comparison, "required": ["output_dir", "recipe"]},
        "else": {"$ref": "#/definitions/recipe"},
    }


def _all_keys() -> list[str]:
    inside = [join(name, field.name) for name, section in SECTIONS.items() for field in fields(section)]
    return [*(field.name for field in Comparison.options()), *inside]


KEEP_TOKENS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay"),
    *("max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "dropout"),
)
"""Options of a stage that do not change the tokens of a step."""


def check_runs(comparison: Comparison, plan: Sequence[PlannedRun]) -> list[Recipe]:
    """Return the recipes of all trainings whose values are known; trials represent the runs chosen from them.

    Raises:
        RecipeError: recipes of runs are invalid, with one line for each problem; two trials are the same training; or
            equal compute is impossible.
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
                f"{where}: values must differ in what the method reads, got {alike}, which train alike. Remove "
                "one of them."
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
    """Return the problems with the task's options in the sections of judged rows."""
    problems = Problems("", list)
    for section in ("test", "selection"):
        own = getattr(comparison, section).options
        problems.overridden = {f"{section}.options": comparison.where(f"{section}.options")}
        check_task_options(f"{section}.options", recipe.data.task, own, problems, others=recipe.data.options)
    return problems.lines


def _check_compute(comparison: Comparison, run: PlannedRun, recipe: Recipe) -> None:
    """Refuse a method whose number of steps cannot be computed from its twin's tokens per step."""
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
                    f"{where}: must not change the tokens of a step if compute is to be equal, "
                    f"got {key}. Search only {', '.join(KEEP_TOKENS)}, or compare by samples."
                )


_NOT_MEMORY = {*KEEP_TOKENS, "hold", "schedule", "reset_optimizer"} - {"optim", "dropout"}
"""Options of a stage that change neither its rows nor its memory."""


@dataclass
class CheckedRecipe:
    """The findings about a recipe.

    Attributes:
        path: the file.
        runs: findings by the names of the methods that share them; the recipe of a single run has the name "".
        errors: errors in the file itself.
    """

    path: str
    runs: dict[str, RunFindings] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether nothing known would stop it."""
        return not self.errors and not any(run.errors for run in self.runs.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        runs = [{"methods": name.split(", ") if name else [], **run.to_dict()} for name, run in self.runs.items()]
        return {"recipe": self.path, "ok": self.is_ok, "errors": self.errors, "runs": runs}


def check_recipe(path: str | Path, overrides: Sequence[str], preflight: Preflight) -> CheckedRecipe:
    """Check a recipe, or every run of a comparison that differs in rows or memory.

    Args:
        path: a YAML file.
        overrides: ``key=value`` each; they take precedence over the file.
        preflight: how to check.
    """
    checked = CheckedRecipe(str(path))
    try:
        for name, recipe in _distinct_runs(path, overrides).items():
            checked.runs[name] = preflight.check(recipe)
            if not name:  # a comparison resumes in an existing folder
                folder = Path(recipe.output_dir)
                checked.runs[name].attempt("output folder", partial(check_folder, folder, recipe))
    except RecipeError as error:
        checked.errors = str(error).splitlines()
    except (OSError, UnicodeError) as error:
        name = str(getattr(error, "filename", None) or path)  # a comparison names the recipe shared by its runs
        checked.errors = [f"{name}: {getattr(error, 'strerror', None) or error}"]
    return checked


def _distinct_runs(path: str | Path, overrides: Sequence[str]) -> dict[str, Recipe]:
    """Return the distinct recipes of a file by the names of the methods that share them.

    A method with another's compute has its twin's recipe, except for its number of steps, which is not known yet.
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
    """Return what determines a recipe's rows and memory."""
    values = resolve(recipe)
    stages = {
        stage: {key: value for key, value in values[stage].items() if key not in _NOT_MEMORY and "_steps" not in key}
        for stage in recipe.stages
    }
    others = {stage for method in METHODS.values() for stage in method.stages}
    kept = {key: value for key, value in values.items() if key not in {*others, "output_dir", "seed", "evaluation"}}
    return json.dumps({**kept, **stages}, sort_keys=True)
