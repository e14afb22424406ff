"""Score a run: accuracy on a task's split, or loss on plain text, as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rim_peft.evaluation.accuracy import judge_answers
from rim_peft.evaluation.plain_text import measure_text_loss
from rim_peft.recipe import EvaluationOptions
from rim_peft.recipe.checks import check_task_options
from rim_peft.recipe.problems import Problems
from rim_peft.run.loading import Run
from rim_peft.run.rows import fingerprint, read_examples
from rim_peft.tasks import Task, get_task
from rim_peft.values import check_integer, shown


def evaluate(
    run: Run,
    task_name: str | None = None,
    *,
    task_options: Mapping[str, Any] | None = None,
    split: str = "test",
    path: str | None = None,
    limit: int | None = None,
    num_blocks: int | None = None,
    by_block: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    on_bad_rows: str = "error",
    progress: bool = False,
) -> dict[str, Any]:
    """Judge a run's answers; the same call returns the same document, to the last digit.

    Args:
        task_name: as in a recipe's ``data.task``; the training's task if not given. A custom task class from a loaded
            folder is imported only if it is named here.
        task_options: options of the task that differ from the training's, or for another task from its defaults.
        path: file, folder or Hub id of the rows; the training's if not given and the task is the same.
        num_blocks: blocks after each prompt; the adapter's own if not given.
        max_new_tokens: maximum length of an answer, EOS included; the recipe's if not given.
        batch_size: questions at a time; the recipe's if not given.
        on_bad_rows: ``"error"`` or ``"drop"``.

    Raises:
        ValueError: there is no task, no such option, no row, or there are bad ones.
    """
    _check_blocks(run, num_blocks, by_block)
    if run.exported is not None and by_block:
        raise ValueError(
            "by_block: must not be given for an export, which only reads out its last block. Give the adapter."
        )
    task = run.task(task_name)
    data = run.recipe.data if run.recipe is not None and task_name in (None, run.recipe.data.task) else None
    if task_options:
        task = _with_options(task, str(task_name) if data is None else data.task, task_options)
    options = run.recipe.evaluation if run.recipe is not None else EvaluationOptions()
    rows = task.load(split, path=path if path is not None or data is None else data.path)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    report = judge_answers(
        run.answerer(num_blocks=num_blocks, max_new_tokens=max_new_tokens),
        read_examples(rows, on_bad_rows=on_bad_rows),
        task,
        by_block=by_block,
        batch_size=batch_size or options.batch_size,
        progress=progress,
        separator=run.separator,
    )
    return {
        "task": task.name,
        "task_options": dict(task_options or {}),
        "split": split,
        "data_sha256": fingerprint(rows)["sha256"],
        **report.to_dict(),
    }


def evaluate_text(
    run: Run,
    paths: Sequence[str | Path],
    *,
    num_blocks: int | None = None,
    window_tokens: int = 192,
    batch_size: int = 4,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure how a run's adapter changes the base's loss on plain text; see :func:`measure_text_loss`.

    Args:
        paths: UTF-8 files of text.
        num_blocks: blocks between context and predicted tokens; the adapter's own if not given.
        window_tokens: tokens per window, at least 2; the first half is read, the rest is predicted.

    Raises:
        ValueError: the run is an export, a file is not text, or the files are too short.
        OSError: a file cannot be read.
    """
    if run.exported is not None:
        raise ValueError(
            "text: must not be given for an export, from which the base cannot be restored. Give the adapter."
        )
    _check_blocks(run, num_blocks)
    check_integer("window_tokens", window_tokens, least=2)
    found = measure_text_loss(
        run.model,
        run.tokenizer,
        [read_text(path) for path in paths],
        num_blocks=num_blocks,
        context_tokens=window_tokens // 2,
        predicted_tokens=window_tokens - window_tokens // 2,
        batch_size=batch_size,
        progress=progress,
    )
    return {"text": [str(path) for path in paths], **found.to_dict()}


def read_text(path: str | Path) -> str:
    """Return a file's text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {shown(str(path))} must be a file of UTF-8 text ({error}).") from error


def _with_options(task: Task, name: str, options: Mapping[str, Any]) -> Task:
    """Return a task with some of its options changed.

    Raises:
        RecipeError: an option is unknown, or its value is not allowed.
    """
    problems = Problems("", list, {"task_options": "task_options"})
    own = {option.name: getattr(task, option.name) for option in fields(task) if option.init}  # type: ignore[arg-type]
    converted = check_task_options("task_options", name, dict(options), problems, others=own)
    problems.raise_any()
    return get_task(name, **{**own, **converted})


def _check_blocks(run: Run, num_blocks: int | None, by_block: bool = False) -> None:
    if (num_blocks or by_block) and run.recipe is not None and not run.recipe.rim_config().num_blocks:
        raise ValueError(
            f"num_blocks, by_block: must not be given for method {run.recipe.method!r}, which has no blocks. Omit "
            "them (--num-blocks, --by-block)."
        )
