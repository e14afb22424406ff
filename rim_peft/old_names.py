"""Modules that were documented under another name: they still import, and say what they are called now."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TASKS = "rim_peft.data.tasks"

MOVED = {
    "rim_peft.data.holdout": "rim_peft.data.sources",
    "rim_peft.evaluation.budget": "rim_peft.evaluation.latency",
    "rim_peft.evaluation.faithfulness": "rim_peft.evaluation.readouts",
    "rim_peft.evaluation.representations": "rim_peft.evaluation.readouts",
    "rim_peft.evaluation.significance": "rim_peft.evaluation.accuracy",
    "rim_peft.evaluation.ways": "rim_peft.evaluation.latency",
    "rim_peft.inference.selection": "rim_peft.inference.readout",
    f"{TASKS}.columns": "rim_peft.tasks.task",
    f"{TASKS}.gsm8k": "rim_peft.tasks.math",
    f"{TASKS}.gsm_hard": "rim_peft.tasks.math",
    f"{TASKS}.hendrycks_math": "rim_peft.tasks.math",
    f"{TASKS}.logiqa": "rim_peft.tasks.choices",
    f"{TASKS}.multiarith": "rim_peft.tasks.math",
    f"{TASKS}.ontology_world": "rim_peft.tasks.ontology",
    f"{TASKS}.potions_world": "rim_peft.tasks.potions",
    f"{TASKS}.prosqa": "rim_peft.tasks.logic",
    f"{TASKS}.reading": "rim_peft.tasks.task",
    f"{TASKS}.sentences": "rim_peft.tasks.steps",
    f"{TASKS}.strategyqa": "rim_peft.tasks.logic",
    f"{TASKS}.svamp": "rim_peft.tasks.math",
}
"""New names by old ones; other modules of ``rim_peft.data.tasks`` kept their last name."""


MOVED_NAMES = {
    f"rim_peft.sequence.{name}": "rim_peft.tuner.bases" for name in ("attention_masks", "check_architecture")
}
"""Modules of names that were documented in another module."""


def find_moved(module: str, name: str) -> Any:
    """Return what a module had under a name, from the module that has it now.

    Raises:
        AttributeError: it never had it.
    """
    new = MOVED_NAMES.get(f"{module}.{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is {new}.{name} now.", FutureWarning, stacklevel=3)
    return getattr(import_module(new), name)


class _OldNames(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_old = fullname in MOVED or fullname == TASKS or fullname.startswith(f"{TASKS}.")
        return ModuleSpec(fullname, self) if is_old else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MOVED.get(old) or old.replace(TASKS, "rim_peft.tasks")
        warnings.warn(f"{old} is {new} now.", FutureWarning, stacklevel=2)
        sys.modules[old] = import_module(new)  # one module under both names, so that its classes exist once


def install() -> None:
    """Make the old names importable. First in line, since ``rim_peft.tasks`` has files of some of these names."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldNames())
