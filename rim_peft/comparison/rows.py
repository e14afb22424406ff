"""The judged rows of a comparison, disjoint from rows that train or choose, and what determines a run's figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rim_peft.comparison.plan import PlannedRun
from rim_peft.comparison.sections import Comparison, RowsOptions
from rim_peft.data.chats import Chat
from rim_peft.data.examples import Example
from rim_peft.methods import METHODS
from rim_peft.recipe import DataOptions, Recipe
from rim_peft.recipe.reading import SHOWN_ONLY, resolve
from rim_peft.run.base import locate_base
from rim_peft.run.rows import fingerprint, load_rows, read_examples
from rim_peft.tasks import Task, get_task
from rim_peft.tuner.files import file_hash
from rim_peft.version import __version__

MEASURES = 3
"""Raised with each change that alters a measured figure, so that old and new figures never share a table."""


@dataclass(frozen=True)
class JudgedRows:
    """The test and selection rows, the same for all runs.

    Attributes:
        task: the task of the shared recipe.
        test: examples for all reported figures.
        selection: examples for choosing searched values and for training the probe.
        hashes: ``num_rows`` and ``sha256`` of each.
        train: the same for the rows that the runs train on, by :func:`_source`; None for streams.
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
        """Return everything that determines a run's figures."""
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
    """Return a SHA-256 of the parts of a recipe that its method reads, independent of its folder."""
    values = resolve(recipe)
    others = {stage for method in METHODS.values() for stage in method.stages} - set(recipe.stages)
    kept = {key: value for key, value in values.items() if key not in {*others, "output_dir", "resume"}}
    for section, _, name in (key.partition(".") for key in SHOWN_ONLY):
        kept[section] = {key: value for key, value in kept[section].items() if key != name}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def base_hash(recipe: Recipe) -> str | None:
    """Return a SHA-256 of the weight files of a base in a folder; None for a base on the Hub."""
    name = recipe.model.name_or_path
    folder = Path("" if name is None else locate_base(name, recipe.model))
    files = sorted(folder.glob("*.safetensors")) if name is not None and folder.is_dir() else []
    return file_hash(*files) if files else None


def load_judged_rows(comparison: Comparison, recipe: Recipe, recipes: Sequence[Recipe]) -> JudgedRows:
    """Load the test and selection rows, keeping the first of rows with the same question.

    Args:
        comparison: says which rows.
        recipe: the shared recipe.
        recipes: recipes of the trained runs, whose training and checkpoint rows must not be among them.

    Raises:
        ValueError: there are no rows, or a question is in two of test, selection, training and checkpoint rows.
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
    examples = list({_prompt(example.question): example for example in reversed(examples)}.values())[::-1]
    if not examples:
        raise ValueError(f"split: must hold rows, got none in {options.split!r}. Choose another, or check its path.")
    return examples


def _check_apart(recipe: Recipe, test: Sequence[Example], selection: Sequence[Example]) -> dict[str, Any] | None:
    """Refuse judged rows that a run trains on, and test rows that choose its checkpoint.

    Returns:
        ``num_rows`` and ``sha256`` of the training rows; None for a stream.
    """
    rows = load_rows(recipe.data, recipe.task())
    is_stream = recipe.data.streaming  # a stream would be read to its end
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
    """Return what determines which rows are loaded: the section ``data`` without its text templates."""
    templates = ("prompt_template", "step_template", "answer_template", "step_separator")
    texts = (*templates, "allow_special_tokens", "chat_template_kwargs", "max_length")
    return repr({key: value for key, value in asdict(data).items() if key not in texts})


def _text(question: Any) -> str:
    """Return a question, text or messages, as one text; tools and variables of a chat do not make it another one."""
    return json.dumps(question, sort_keys=True, ensure_ascii=False)


def _prompt(question: Any) -> str:
    """Return a question with what its chat template gets, as one text."""
    return _text([question, question.columns()] if isinstance(question, Chat) else question)


def _hash(examples: Sequence[Example]) -> dict[str, Any]:
    return fingerprint(
        {
            "question": example.question,
            "steps": list(example.steps or ()),
            "answer": example.answer,
            **(example.question.columns() if isinstance(example.question, Chat) else {}),
        }
        for example in examples
    )
