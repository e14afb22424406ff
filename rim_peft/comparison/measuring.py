"""What is measured of one run: its answers on the test rows, and what its blocks hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rim_peft.comparison.plan import PlannedRun
from rim_peft.comparison.sections import Comparison, RowsOptions
from rim_peft.data.examples import Example
from rim_peft.data.tasks import Task, get_task
from rim_peft.recipe import Recipe
from rim_peft.run.rows import fingerprint, read_examples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgedRows:
    """The rows that decide and those that choose, the same for all runs.

    Attributes:
        task: the task of the shared recipe.
        test: examples that decide.
        selection: examples for the probe.
        hashes: of both, ``num_rows`` and ``sha256`` each.
    """

    task: Task
    test: list[Example]
    selection: list[Example]
    hashes: dict[str, dict[str, Any]]

    def spec(self, comparison: Comparison, run: PlannedRun) -> dict[str, Any]:
        """Return what decides a run's numbers besides its training."""
        measures = {key: value for key, value in asdict(comparison.measures).items() if not key.startswith("latency")}
        measures["of"] = run.name in comparison.looked_into
        return {
            "data": self.hashes,
            "measures": measures,
            "method": {"changes": {**comparison.changes, **run.method.changes}, "view": run.method.view},
        }


def load_judged_rows(comparison: Comparison, recipe: Recipe) -> JudgedRows:
    """Load the test and selection rows.

    Raises:
        ValueError: there are none, or a question is in both.
    """
    test, selection = (_load(recipe, options) for options in (comparison.test, comparison.selection))
    shared = {repr(example.question) for example in test} & {repr(example.question) for example in selection}
    if shared:
        raise ValueError(
            f"selection: must share no question with test, got {len(shared)} of them, such as "
            f"{sorted(shared)[0][:80]}. Choose another split."
        )
    return JudgedRows(recipe.task(), test, selection, {"test": _hash(test), "selection": _hash(selection)})


def _load(recipe: Recipe, options: RowsOptions) -> list[Example]:
    data = recipe.data
    task = get_task(data.task, **{**data.options, **options.options})
    rows = task.load(options.split, path=options.path or data.path)
    examples = read_examples(rows, on_bad_rows=data.on_bad_rows, limit=options.rows)
    if not examples:
        raise ValueError(f"split: must hold rows, got none in {options.split!r}.")
    return examples


def _hash(examples: Sequence[Example]) -> dict[str, Any]:
    return fingerprint({"question": example.question, "answer": example.answer} for example in examples)
