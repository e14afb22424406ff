"""A run's adapter → an export, checked on the task's rows or on prompts of a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rim_peft.data.examples import Question
from rim_peft.export.checking import LEAST_PROMPTS, CheckResult
from rim_peft.export.merged import export_merged
from rim_peft.export.options import ExportOptions, Prompts, check_new
from rim_peft.export.peft_lora import export_peft_lora
from rim_peft.methods import get_method
from rim_peft.recipe import EvaluationOptions
from rim_peft.recipe.snapshot import resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run.loading import RECIPE_FILE, Run, describe_asking, load_run
from rim_peft.run.rows import read_examples

FORMATS = {"merged": export_merged, "peft-lora": export_peft_lora}
_CHECKED_ROWS = 64


def export(
    source: str,
    folder: Path,
    *,
    form: str = "merged",
    options: ExportOptions | None = None,
    questions: Iterable[Question] | None = None,
    max_new_tokens: int | None = None,
    task_name: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> CheckResult:
    """Write an adapter as a model that runs without this package, and check that it gives the same tokens.

    Args:
        source: output folder of a training, or an adapter's folder or Hub id.
        folder: where to write to.
        form: one of ``FORMATS``.
        options: how to write it.
        questions: what to check it on; the first rows of the task's test split if not given, or of validation.
        max_new_tokens: tokens of a checked answer at most; the recipe's if not given.
        task_name: the task whose rows it is checked on, as in a recipe's ``data.task``; that of the training if not
            given, unless that is a class of somebody's own: it is imported only if it is named here.
        base: folder or Hub id of the base, if it is not where the adapter says.
        revision: branch, tag or commit of the adapter on the Hub.
        trust_remote_code: let code run that comes with the base or the tokenizer.

    Raises:
        ValueError: the adapter cannot be expressed so, ``folder`` is in use, or there are too few prompts.
        ExportCheckError: the export answers otherwise; its files are kept.
    """
    if form == "merged":
        check_new(folder)  # before a base is loaded, and before anything can be written to what is there
    run = load_run(source, base=base, revision=revision, trust_remote_code=trust_remote_code)
    if run.exported is not None:
        raise ValueError(f"{source}: is an export already. Give the adapter that it was made from.")
    if run.recipe is not None and not get_method(run.recipe.method).is_plain:
        raise ValueError(
            f"method: must be one that answers after tokens, got {run.recipe.method!r}: plain models have no "
            "continuous thoughts. Ask it with this package (rim-peft generate)."
        )
    evaluation = run.recipe.evaluation if run.recipe is not None else EvaluationOptions()
    prompts = Prompts(
        questions=list(questions) if questions is not None else _task_questions(run, task_name),
        templates=run.templates,
        max_new_tokens=max_new_tokens or evaluation.max_new_tokens,
    )
    # The files of an export that fails its check are kept, and evaluated to see why.
    more: dict[str, Any] = {}
    if form == "merged" and run.recipe is not None:
        more["papers"] = {RECIPE_FILE: write_yaml(resolve(run.recipe))}
        more["noted"] = {"asked": describe_asking(run.recipe)}
    return FORMATS[form](run.model, run.tokenizer, folder, prompts, options or ExportOptions(), source=source, **more)


def _task_questions(run: Run, task_name: str | None) -> list[Question]:
    """Return the first questions of the task's test split, or of validation where there is none.

    Raises:
        ValueError: the adapter does not say what it was trained on, or its rows cannot be found.
    """
    remedy = f"Give a file with {LEAST_PROMPTS} or more questions (--prompts)."
    if run.recipe is None and task_name is None:
        raise ValueError(f"prompts: must be given, since the adapter does not say what it was trained on. {remedy}")
    task = run.task(task_name)
    path = run.recipe.data.path if run.recipe is not None and task_name in (None, run.recipe.data.task) else None
    for split in ("test", "validation"):
        try:
            rows = task.load(split, path=path)
        except FileNotFoundError:
            continue
        return [example.question for example in read_examples(rows, on_bad_rows="drop", limit=_CHECKED_ROWS)]
    raise ValueError(f"prompts: must be given, since the rows of the training are not in {path!r}. {remedy}")
