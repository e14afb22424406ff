"""Tasks by name."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from rim_peft.tasks.task import Task
from rim_peft.values import shown

__all__ = ["TASKS", "Task", "get_task", "task_class"]

TASKS = {
    "aqua-rat": "rim_peft.tasks.choices:AQuARAT",
    "arc-challenge": "rim_peft.tasks.choices:ARCChallenge",
    "arc-easy": "rim_peft.tasks.choices:ARCEasy",
    "bbh": "rim_peft.tasks.logic:BigBenchHard",
    "commonsenseqa": "rim_peft.tasks.choices:CommonsenseQA",
    "gsm-hard": "rim_peft.tasks.math:GSMHard",
    "gsm-symbolic": "rim_peft.tasks.gsm_symbolic:GSMSymbolic",
    "gsm8k": "rim_peft.tasks.math:GSM8K",
    "gsm8k-aug": "rim_peft.tasks.math:GSM8KAug",
    "gsm8k-aug-nl": "rim_peft.tasks.math:GSM8KAugNL",
    "handfuls": "rim_peft.tasks.handfuls:Handfuls",
    "logiqa": "rim_peft.tasks.choices:LogiQA",
    "math": "rim_peft.tasks.math:MATH",
    "multiarith": "rim_peft.tasks.math:MultiArith",
    "multiplication": "rim_peft.tasks.multiplication:Multiplication",
    "ontology": "rim_peft.tasks.ontology:Ontology",
    "potions": "rim_peft.tasks.potions:Potions",
    "prontoqa": "rim_peft.tasks.logic:ProntoQA",
    "prosqa": "rim_peft.tasks.logic:ProsQA",
    "rows": "rim_peft.tasks.rows:OwnRows",
    "strategyqa": "rim_peft.tasks.logic:StrategyQA",
    "svamp": "rim_peft.tasks.math:SVAMP",
}
"""Built-in tasks; each is imported on first use."""


REASONING_GYM = "reasoning-gym:"
"""Start of the names of tasks by reasoning-gym's generators."""


def get_task(name: str, /, **options: Any) -> Task:
    """Return a task by its name, or your own as ``"package.module:ClassName"``, whose module is imported.

    ``"reasoning-gym:NAME"`` is the task of a generator of that package. Your module is searched on Python's path, with
    the working directory last.

    >>> get_task("gsm8k", steps="sentences").steps
    'sentences'

    Raises:
        ValueError: there is no such task or option, or a value is not allowed.
    """
    task = task_class(name)
    known = [field.name for field in fields(task)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"{option}: no option of task {name!r}{_suggest(option, known)} Its options: {there}.")
    return task(**{option: tuple(value) if isinstance(value, list) else value for option, value in options.items()})


def task_class(name: str) -> type[Task]:
    """Return the class of a task by its name, as for :func:`get_task`.

    Raises:
        ValueError: there is no such task.
    """
    if name.startswith(REASONING_GYM):
        from rim_peft.tasks import reasoning_gym

        return reasoning_gym.task_class(name.removeprefix(REASONING_GYM))
    module_name, colon, class_name = TASKS.get(name, name).partition(":")
    if not colon or not re.fullmatch(r"[\w.]+:\w+", f"{module_name}:{class_name}"):
        raise ValueError(
            f"task: no task {shown(name)}{_suggest(name, list(TASKS))} Choose one of {', '.join(TASKS)}, "
            f"{REASONING_GYM}NAME for a generator of reasoning-gym, or your own class as package.module:ClassName."
        )
    if name not in TASKS and os.getcwd() not in sys.path:
        # Only for the user's own class: files in the working directory must not otherwise be imported as packages.
        sys.path.append(os.getcwd())
    try:
        task: Any = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "Install its package, or put its folder on PYTHONPATH."
        raise ValueError(f"task: {name!r} cannot be imported: {error}. {remedy}") from error
    is_task = isinstance(task, type) and issubclass(task, Task) and is_dataclass(task)
    if not is_task:
        rule = "must be a dataclass that extends rim_peft.tasks.task.Task"
        raise ValueError(f"task: {name!r} {rule}, got {task!r}. Make it one.")
    return task


def _suggest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else "."
