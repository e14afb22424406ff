"""Assemble measured runs into one results document, and read it by method, pooled over seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rim_peft.comparison.plan import PlannedRun, overrides, read_record
from rim_peft.comparison.rows import JudgedRows
from rim_peft.comparison.sections import Comparison, MethodOptions
from rim_peft.evaluation.accuracy import PairedDifference, Score, paired_difference, pooled_difference
from rim_peft.recipe import load_recipe
from rim_peft.run.record import describe_hardware, describe_versions


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


FORMAT = 1
RESULTS = "results.json"


def assemble(
    comparison: Comparison,
    plan: Sequence[PlannedRun],
    rows: JudgedRows,
    *,
    latency: Sequence[Mapping[str, Any]],
    started: float,
    command: Sequence[str],
) -> dict[str, Any]:
    """Return the results document of finished runs.

    Args:
        comparison: what was compared.
        plan: its runs with their values, trials included.
        rows: the judged rows.
        latency: rows of the latency table.
        started: start of this process, in seconds since 1970.
        command: the command line.
    """
    search = [_trial(run, plan) for run in plan if run.is_trial]
    plan = [run for run in plan if not run.is_trial]
    measured = [read_record(run) for run in plan]
    recipe = load_recipe(comparison.recipe, overrides(comparison.changes))
    reference = next(found for run, found in zip(plan, measured, strict=True) if run.name == comparison.reference)
    entries = comparison.entries()
    changes = {run.name: {**run.method.changes, **(run.values or {})} for run in plan}
    return {
        "format": FORMAT,
        "name": Path(comparison.output_dir).name,
        "kind": comparison.kind,
        "command": list(command),
        "started": _time(started),
        "finished": _time(time.time()),
        "versions": describe_versions(),
        "hardware": describe_hardware(),
        "task": {
            "name": rows.task.name,
            "options": recipe.data.options,
            "answer_rules": list(rows.task.answer_rules),
            "answer_rule": rows.task.answer_rule,
        },
        "data": {"train": reference["train_data"], **rows.hashes},
        "base": {"name": recipe.model.name_or_path, "parameters": reference["base_parameters"]},
        "reference": comparison.reference,
        "methods": [
            {
                "name": name,
                "label": method.label or name,
                "method": _method_name(recipe.method, changes[name], trained=method.train),
                "view": _view(name, method, comparison, plan, measured),
                "changes": changes[name],
            }
            for name, method in entries.items()
        ],
        "search": search,
        "runs": [
            {"name": run.name, "seed": run.seed, "folder": str(run.folder), **_public(found)}
            for run, found in zip(plan, measured, strict=True)
        ],
        "summary": [_summarize(name, _of(name, plan, measured)) for name in entries],
        "pairs": _pairs(comparison.reference, plan, measured),
        "latency": list(latency),
        "representations": next((found["representations"] for found in measured if found["representations"]), None),
    }


def _trial(run: PlannedRun, plan: Sequence[PlannedRun]) -> dict[str, Any]:
    is_chosen = any(other.values == run.values for other in plan if other.name == run.name and not other.is_trial)
    return {
        "name": run.name,
        "seed": run.seed,
        "values": run.values,
        "score": read_record(run)["score"],
        "is_chosen": is_chosen,
    }


def _view(
    name: str,
    method: MethodOptions,
    comparison: Comparison,
    plan: Sequence[PlannedRun],
    measured: Sequence[Mapping[str, Any]],
) -> str:
    """Return what a method's trainings share with the reference's: compute, samples, or neither ("own")."""
    trainings = {(run.name, run.seed): found["training"] for run, found in zip(plan, measured, strict=True)}
    own = [(seed, training) for (other, seed), training in trainings.items() if other == name and training]
    reference = [trainings.get((comparison.reference, seed)) for seed, _ in own]
    samples = [training["num_samples"] for _, training in own]
    is_equal = samples == [other["num_samples"] if other else None for other in reference]
    return method.view if method.view == "compute" or is_equal else "own"


def _public(found: Mapping[str, Any]) -> dict[str, Any]:
    hidden = ("spec", "right", "seconds", "train_data", "base_parameters", "representations")
    return {key: value for key, value in found.items() if key not in hidden}


def _method_name(shared: str, changes: Mapping[str, Any], *, trained: bool) -> str:
    return str(changes.get("method", shared)) if trained else "base"


def _of(name: str, plan: Sequence[PlannedRun], measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found for run, found in zip(plan, measured, strict=True) if run.name == name]


def _summarize(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pool a method's seeds."""
    lengths = list(dict.fromkeys(length for run in runs for length in run["by_length"]))
    return {
        "name": name,
        "num_seeds": len(runs),
        **_pool([run["final"] for run in runs]),
        "by_length": {length: _pool([run["by_length"][length] for run in runs]) for length in lengths},
    }


def _pool(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pooled = Score(sum(score["num_correct"] for score in scores), sum(score["num_rows"] for score in scores))
    low, high = pooled.interval
    return {
        "accuracy": round(pooled.accuracy, 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "seed_std": round(statistics.stdev(score["accuracy"] for score in scores), 6) if len(scores) > 1 else None,
    }


def _pairs(reference: str, plan: Sequence[PlannedRun], measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pair every method with the reference on the same rows, for each seed and over all seeds."""
    right = {(run.name, run.seed): found["right"] for run, found in zip(plan, measured, strict=True)}
    seeds = [seed for name, seed in right if name == reference]
    pairs = []
    for name in dict.fromkeys(run.name for run in plan if run.name != reference):
        own = [run.seed for run in plan if run.name == name]
        is_base = not next(run for run in plan if run.name == name).method.train
        # The untrained base has a single seed, which is paired with every seed of the reference.
        shared = [(seed, own[0] if is_base else seed) for seed in seeds if is_base or seed in own]
        each = [(seed, _bits(right[reference, seed]), _bits(right[name, other])) for seed, other in shared]
        for seed, first, second in each:
            pairs.append(_pair(name, reference, seed, first, second))
        if len(each) > 1:
            found = pooled_difference([(first, second) for _, first, second in each])
            pairs.append(_entry(found, name, reference, "all", num_rows=len(each[0][1])))
    return pairs


def _pair(name: str, reference: str, seed: int | str, first: list[bool], second: list[bool]) -> dict[str, Any]:
    return _entry(paired_difference(first, second), name, reference, seed, num_rows=len(first))


def _entry(found: PairedDifference, name: str, reference: str, seed: int | str, *, num_rows: int) -> dict[str, Any]:
    return {
        "name": name,
        "reference": reference,
        "seed": seed,
        "num_rows": num_rows,
        "difference": round(found.difference, 6),
        "standard_error": round(found.standard_error, 6),
        "only_reference": found.only_a,
        "only_other": found.only_b,
        "p_value": found.p_value,
    }


def _bits(text: str) -> list[bool]:
    return [bit == "1" for bit in text]


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
