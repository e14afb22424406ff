"""Read a results document by method, pooled over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rim_peft.evaluation.scores import Score


@dataclass(frozen=True)
class Method:
    """One entry of ``methods``.

    Attributes:
        name: its key in the document.
        label: its name in tables and plots; says so if the method had the reference's compute.
        method: how it answers (``"rim"``, ``"cot"``, …).
        view: what it shares with the others: ``"samples"``, ``"compute"``, or neither (``"own"``).
        changes: recipe keys that differ from the shared recipe, with their values.
    """

    name: str
    label: str
    method: str
    view: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """A results document, read by method.

    Attributes:
        document: the JSON document that a comparison writes.
    """

    document: Mapping[str, Any]

    @property
    def methods(self) -> list[Method]:
        """The methods in the order of the table."""
        return [_method(entry) for entry in self.document["methods"]]

    @property
    def reference(self) -> str:
        """Name of the method that the others are compared with."""
        return str(self.document["reference"])

    @property
    def is_ablation(self) -> bool:
        """Whether each method changes one key of the same recipe."""
        return bool(self.document["kind"] == "ablate")

    @property
    def lengths(self) -> list[str]:
        """The test rows' numbers of steps, shortest first."""
        found = {length for run in self.document["runs"] for length in run.get("by_length") or {}}
        return sorted((length for length in found if length.isdigit()), key=int)

    def label(self, name: str) -> str:
        """Return a method's label; its name if the document does not list it."""
        return next((method.label for method in self.methods if method.name == name), name)

    def runs(self, name: str) -> list[Mapping[str, Any]]:
        """Return a method's runs, one per seed."""
        return [run for run in self.document["runs"] if run["name"] == name]

    def parts(self, name: str, part: str) -> list[Any]:
        """Return a method's measurements under a key, one for each seed that has it."""
        return [run[part] for run in self.runs(name) if run.get(part)]

    def having(self, part: str) -> list[Method]:
        """Return the methods that have a measurement, in the order of the table."""
        return [method for method in self.methods if self.parts(method.name, part)]

    def detailed(self, part: str) -> list[Method]:
        """Return the methods that are also shown by number of steps: only the reference in an ablation."""
        return [method for method in self.having(part) if not self.is_ablation or method.name == self.reference]

    def seeds(self, name: str, part: str) -> str:
        """Return the seeds that have a measurement, as text."""
        return ", ".join(str(run["seed"]) for run in self.runs(name) if run.get(part))

    def mean(self, name: str, key: str) -> float | None:
        """Return the mean over seeds of a training figure; None for a method without training."""
        return mean(training.get(key) for training in self.parts(name, "training"))

    def summary(self, name: str) -> Mapping[str, Any]:
        """Return a method's entry of ``summary``."""
        return next((entry for entry in self.document["summary"] if entry["name"] == name), {})

    def pair(self, name: str) -> Mapping[str, Any] | None:
        """Return the comparison of a method with the reference, over all seeds or for the only one."""
        found = [pair for pair in self.document.get("pairs") or [] if pair["name"] == name]
        pooled = [pair for pair in found if pair["seed"] == "all"]
        return next(iter(pooled or found), None)


def _method(entry: Mapping[str, Any]) -> Method:
    ending = " (same compute)" if entry.get("view") == "compute" else ""
    return Method(
        name=entry["name"],
        label=f"{entry.get('label') or entry['name']}{ending}",
        method=entry["method"],
        view=entry.get("view") or "samples",
        changes=dict(entry.get("changes") or {}),
    )


def pool(scores: Iterable[Mapping[str, Any] | None]) -> Score | None:
    """Return the share of correct answers over the rows of all seeds; None if there are no rows."""
    there = [score for score in scores if score]
    num_rows = sum(score["num_rows"] for score in there)
    return Score(sum(score["num_correct"] for score in there), num_rows) if num_rows else None


def pool_lengths(scores: Iterable[Mapping[str, Mapping[str, Any]] | None]) -> dict[str, Score]:
    """Return the same by number of steps, shortest first."""
    there = [score for score in scores if score]
    lengths = sorted({length for score in there for length in score if length.isdigit()}, key=int)
    pooled = {length: pool(score.get(length) for score in there) for length in lengths}
    return {length: score for length, score in pooled.items() if score is not None}


def group(
    parts: Iterable[Iterable[Mapping[str, Any]]], key: Callable[[Mapping[str, Any]], Any]
) -> dict[Any, list[Mapping[str, Any]]]:
    """Group the entries of all seeds by their topic, in the order of the first seed."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for part in parts:
        for entry in part:
            found.setdefault(key(entry), []).append(entry)
    return found


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
