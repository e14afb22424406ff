"""One results document of a comparison, assembled from its measured runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rim_peft.comparison.plan import PlannedRun, overrides, read_record
from rim_peft.comparison.rows import JudgedRows
from rim_peft.comparison.sections import Comparison, MethodOptions
from rim_peft.evaluation.accuracy import PairedDifference, paired_difference, pooled_difference
from rim_peft.evaluation.scores import Score
from rim_peft.recipe import Recipe, load_recipe
from rim_peft.run.record import describe_hardware, describe_versions

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
        "methods": _methods(comparison, recipe, plan, measured),
        "search": search,
        "runs": [
            {"name": run.name, "seed": run.seed, "folder": str(run.folder), **_public(found)}
            for run, found in zip(plan, measured, strict=True)
        ],
        "summary": [_summarize(name, _of(name, plan, measured)) for name in comparison.entries()],
        "pairs": _pairs(comparison.reference, plan, measured),
        "latency": list(latency),
        "representations": next((found["representations"] for found in measured if found["representations"]), None),
    }


def _methods(
    comparison: Comparison, recipe: Recipe, plan: Sequence[PlannedRun], measured: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return each method's entry: how it answers, and in what it differs from the shared recipe."""
    changes = {run.name: {**run.method.changes, **(run.values or {})} for run in plan}
    return [
        {
            "name": name,
            "label": method.label or name,
            "method": _method_name(recipe.method, changes[name], trained=method.train),
            "view": _view(name, method, comparison, plan, measured),
            "changes": changes[name],
        }
        for name, method in comparison.entries().items()
    ]


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
