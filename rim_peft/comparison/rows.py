"""The rows that a comparison judges, kept apart from those that train and choose; and what decides a run's numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rim_peft.comparison.plan import PlannedRun
from rim_peft.comparison.sections import Comparison, RowsOptions
from rim_peft.data.examples import Example
from rim_peft.methods import METHODS
from rim_peft.recipe import DataOptions, Recipe
from rim_peft.recipe.reading import resolve
from rim_peft.run.base import locate_base
from rim_peft.run.rows import fingerprint, load_rows, read_examples
from rim_peft.tasks import Task, get_task
from rim_peft.version import __version__

MEASURES = 2
"""Raised with each change that gives a measured figure another value, so that old and new ones never share a table."""


@dataclass(frozen=True)
class JudgedRows:
    """The rows that decide and those that choose, the same for all runs.

    Attributes:
        task: the task of the shared recipe.
        test: examples that decide.
        selection: examples that searched values are chosen on, and the probe is trained on.
        hashes: of both, ``num_rows`` and ``sha256`` each.
        train: by :func:`_source`, the same of the rows that the runs train on; None for streams.
    """

    task: Task
    test: list[Example]
    selection: list[Example]
    hashes: dict[str, dict[str, Any]]
    train: dict[str, dict[str, Any] | None]

    def trained_on(self, recipe: Recipe) -> dict[str, Any] | None:
        """Return ``num_rows`` and ``sha256`` of the rows that a recipe trains on; None for a stream."""
        return self.train[_source(recipe.data)]

    def spec(self, comparison: Comparison, run: PlannedRun, recipe: Recipe) -> dict[str, Any]:
        """Return what decides a run's numbers."""
        is_looked_into = run.name in comparison.looked_into
        options = asdict(comparison.measures) if is_looked_into else {"blocks": comparison.measures.blocks}
        measures = {key: value for key, value in options.items() if not key.startswith("latency")}
        judged = {"selection": self.hashes["selection"]} if run.is_trial else self.hashes
        return {
            "data": {**judged, "train": self.trained_on(recipe) if run.method.train else None},
            "answer_rule": self.task.answer_rule,
            "measures": {"version": MEASURES}
            if run.is_trial
            else {**measures, "of": is_looked_into, "version": MEASURES},
            "recipe": recipe_hash(recipe),
            "base": base_hash(recipe),
            "same_compute_as": run.method.same_compute_as,
            "version": __version__,
        }


def recipe_hash(recipe: Recipe) -> str:
    """Return a SHA-256 of what a recipe's method reads of it, wherever its folder lies."""
    values = resolve(recipe)
    others = {stage for method in METHODS.values() for stage in method.stages} - set(recipe.stages)
    kept = {key: value for key, value in values.items() if key not in {*others, "output_dir", "resume"}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def base_hash(recipe: Recipe) -> str | None:
    """Return a SHA-256 of the weight files of a base in a folder; None for one of the Hub."""
    name = recipe.model.name_or_path
    folder = Path("" if name is None else locate_base(name, recipe.model))
    files = sorted(folder.glob("*.safetensors")) if name is not None and folder.is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest() if files else None


def load_judged_rows(comparison: Comparison, recipe: Recipe, recipes: Sequence[Recipe]) -> JudgedRows:
    """Load the test and selection rows; of rows with the same question the first one counts.

    Args:
        comparison: which rows.
        recipe: the shared recipe.
        recipes: of the runs that train, whose training and checkpoint rows must not be among them.

    Raises:
        ValueError: there are none, or a question is in two of test, selection, training and checkpoint rows.
    """
    test, selection = (_load(recipe, options) for options in (comparison.test, comparison.selection))
    sources = {_source(other.data): other for other in recipes}
    train = {source: _check_apart(other, test, selection) for source, other in sources.items()}
    shared = {_text(example.question) for example in test} & {_text(example.question) for example in selection}
    if shared:
        raise ValueError(
            f"selection: must share no question with test, got {len(shared)} of them, such as "
            f"{sorted(shared)[0][:80]}. Choose another split."
        )
    return JudgedRows(recipe.task(), test, selection, {"test": _hash(test), "selection": _hash(selection)}, train)


def _load(recipe: Recipe, options: RowsOptions) -> list[Example]:
    data = recipe.data
    task = get_task(data.task, **{**data.options, **options.options})
    rows = task.load(options.split, path=options.path or data.path)
    examples = read_examples(rows, on_bad_rows=data.on_bad_rows, limit=options.rows)
    examples = list({_text(example.question): example for example in reversed(examples)}.values())[::-1]
    if not examples:
        raise ValueError(f"split: must hold rows, got none in {options.split!r}.")
    return examples


def _check_apart(recipe: Recipe, test: Sequence[Example], selection: Sequence[Example]) -> dict[str, Any] | None:
    """Refuse judged rows that a run trains on, and test rows that choose its checkpoint.

    Returns:
        ``num_rows`` and ``sha256`` of the training rows; None for a stream.
    """
    rows = load_rows(recipe.data, recipe.task())
    is_stream = recipe.data.streaming  # which would be read to its end
    seen = {"training rows": None if is_stream else rows.train, "rows that choose the checkpoint": rows.validation}
    judged = {"test": test, "selection": selection}
    for name, used in seen.items():
        questions = {_text(row["question"]) for row in used} if used is not None else set()
        for split, examples in judged.items():
            shared = sum(_text(example.question) in questions for example in examples)
            if shared and (split == "test" or name == "training rows"):
                raise ValueError(
                    f"{split}: must share no question with the {name}, got {shared} of {len(examples)}. Choose other "
                    "splits (data.train_split, data.validation_split, test, selection)."
                )
    return None if is_stream else fingerprint(rows.train)


def _source(data: DataOptions) -> str:
    """Return what tells which rows are loaded: a section ``data`` without the texts that they are put into."""
    written = ("prompt_template", "step_template", "answer_template", "step_separator", "allow_special_tokens")
    texts = (*written, "max_length")
    return repr({key: value for key, value in asdict(data).items() if key not in texts})


def _text(question: Any) -> str:
    """Return a question, text or messages, as one text."""
    return json.dumps(question, sort_keys=True, ensure_ascii=False)


def _hash(examples: Sequence[Example]) -> dict[str, Any]:
    return fingerprint(
        {"question": example.question, "steps": list(example.steps or ()), "answer": example.answer}
        for example in examples
    )
