"""How long the methods of a comparison take to answer, side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rim_peft.comparison.measuring import last_file, last_weights
from rim_peft.comparison.plan import PlannedRun, run_recipe
from rim_peft.comparison.rows import JudgedRows, base_hash, recipe_hash
from rim_peft.comparison.sections import Comparison
from rim_peft.data.examples import Example
from rim_peft.evaluation.latency import Way, measure_latency
from rim_peft.methods import get_method
from rim_peft.recipe import Recipe
from rim_peft.run import load_run
from rim_peft.run.record import describe_hardware, describe_versions
from rim_peft.training.files import write_text
from rim_peft.tuner.files import file_hash, read_object

logger = logging.getLogger(__name__)

LATENCY = "latency.json"


def time_methods(comparison: Comparison, plan: Sequence[PlannedRun], rows: JudgedRows) -> list[dict[str, Any]]:
    """Time one trained run of each kind of method, or read the times measured before.

    LoRA is merged if the base is not quantised, as an adapter is served. All runs are loaded at once.

    Args:
        comparison: what is compared.
        plan: its finished runs.
        rows: judged rows; the first test rows are asked.

    Returns:
        The figures of each method at each batch size, with ratios to the method that answers at once.
    """
    sizes, number = comparison.measures.latency_batch_sizes, comparison.measures.latency_questions
    if not sizes:
        return []
    path = Path(comparison.output_dir) / LATENCY
    chosen = _one_of_each(comparison, plan)
    spec = {
        "batch_sizes": sizes,
        "num_questions": number,
        "data": rows.hashes["test"]["sha256"],
        "runs": {run.name: _identity(run, run_recipe(comparison, run)) for run, _ in chosen},
        "hardware": describe_hardware(),
        "versions": describe_versions(),
    }
    if path.exists():
        kept = read_object(path, keys=("spec", "latency"), remedy="Delete it: times are then taken again.")
        if kept["spec"] == spec:
            return list(kept["latency"])
    logger.info("timing answers side by side")
    reference = next((run.name for run, method in chosen if method == "answer"), None)
    with ExitStack() as judged:
        ways = [_way(run, run_recipe(comparison, run), rows.test[:number], judged) for run, _ in chosen]
        latencies = measure_latency(ways, batch_sizes=sizes, num_questions=number, reference=reference)
    found = [latency.to_dict() for latency in latencies]
    write_text(path, json.dumps({"spec": spec, "latency": found}, indent=1) + "\n")
    return found


def _one_of_each(comparison: Comparison, plan: Sequence[PlannedRun]) -> list[tuple[PlannedRun, str]]:
    """Return the reference and the first trained run of every other kind of method."""
    kinds: dict[str, PlannedRun] = {}
    for run in plan:
        if run.method.train and run.method.view == "samples":
            kind = run_recipe(comparison, run).method
            if run.name == comparison.reference and kinds.get(kind, run).name != run.name:
                kinds.pop(kind)
            kinds.setdefault(kind, run)
    return [(run, kind) for kind, run in kinds.items()]


def _identity(planned: PlannedRun, recipe: Recipe) -> dict[str, Any]:
    """Return what determines a run's answers, and so their lengths: a training may be made again with other rows."""
    return {"recipe": recipe_hash(recipe), "base": base_hash(recipe), "weights": file_hash(last_file(planned, recipe))}


def _way(planned: PlannedRun, recipe: Recipe, examples: Sequence[Example], judged: ExitStack) -> Way:
    """Return how to time a run's answers, with the weights whose answers are judged until the stack ends."""
    run = replace(load_run(planned.folder, trust_remote_code=recipe.model.trust_remote_code), recipe=recipe)
    judged.enter_context(last_weights(planned, run))
    if recipe.model.quantization is None:
        run.model.merge_adapter()
    answerer = run.answerer()
    prompts = answerer.tokenize([example.question for example in examples])
    answers = [example.answer for example in examples]
    return get_method(recipe.method).way(planned.name, prompts, answerer, separator=run.separator, answers=answers)
