"""Measure one run: its answers, and what its blocks hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict

from rim_peft.comparison.plan import PlannedRun
from rim_peft.comparison.rows import JudgedRows, recipe_hash
from rim_peft.comparison.sections import Comparison
from rim_peft.data.examples import Example
from rim_peft.evaluation.accuracy import AccuracyReport, judge_answers, score_by_rule
from rim_peft.evaluation.controls import ChainCounterfactual, ChainTask, run_controls
from rim_peft.evaluation.latency import budget_curve
from rim_peft.evaluation.probe import auroc_by_block, fit_probe
from rim_peft.evaluation.readouts import (
    BlockReadouts,
    block_components,
    collect_readouts,
    gap_closed,
    judge_steps,
    training_components,
)
from rim_peft.evaluation.scores import Score, score_overall_and_by_length
from rim_peft.inference.readout import select_by_confidence, select_by_score, select_by_vote, select_final
from rim_peft.recipe import Recipe
from rim_peft.run import Run
from rim_peft.training.rim import READOUT_STEPS
from rim_peft.tuner.config import active_config
from rim_peft.tuner.tensors import read_tensors


def measure_run(comparison: Comparison, planned: PlannedRun, run: Run, rows: JudgedRows) -> dict[str, Any]:
    """Measure one run on the test rows.

    Returns:
        The run's part of the results document, plus keys that only assembling it needs: ``final`` (score under the
        deciding rule), ``right`` (a bit per test row), ``train_data`` and ``base_parameters``.
    """
    with last_weights(planned, run) as recipe:
        return _measure(_Judge(comparison, run, recipe, rows, planned.folder), planned)


def judge_trial(comparison: Comparison, planned: PlannedRun, run: Run, rows: JudgedRows) -> dict[str, Any]:
    """Judge a trial of searched values on the selection rows, without reading the test rows.

    Returns:
        ``score`` under the deciding rule.
    """
    with last_weights(planned, run) as recipe:
        judge = _Judge(comparison, run, recipe, rows, planned.folder)
        return {"score": judge.answer(rows.selection).final.to_dict()}


def _measure(judge: _Judge, planned: PlannedRun) -> dict[str, Any]:
    run, rows, comparison = judge.run, judge.rows, judge.comparison
    has_blocks = active_config(run.model).num_blocks > 0
    looks_into = has_blocks and planned.name in comparison.looked_into
    readouts = judge.read(rows.test) if has_blocks and (comparison.measures.blocks or looks_into) else None
    judged = judge.answer(rows.test) if readouts is None else readouts
    right = [verdict[rows.task.answer_rule] for verdict in judged.verdicts]
    final = score_overall_and_by_length(right, [_length(example) for example in rows.test])
    return {
        "recipe_sha256": recipe_hash(judge.recipe),
        "training": _training(run),
        "accuracy": {rule: found.to_dict() for rule, found in score_by_rule(judged.verdicts).items()},
        "num_cut": judged.num_cut,
        "by_length": _by_length(final),
        **_measure_blocks(judge, readouts if comparison.measures.blocks else None),
        **_look_into(judge, readouts if looks_into else None),
        "final": final["all"].to_dict(),
        "right": "".join("1" if is_right else "0" for is_right in right),
        "train_data": run.record["data"]["train"] if planned.method.train else None,
        "base_parameters": count_base(run.model),
    }


@dataclass(frozen=True)
class _Judge:
    """Asks one run, with the arguments that all measures share."""

    comparison: Comparison
    run: Run
    recipe: Recipe
    rows: JudgedRows
    folder: Path

    @property
    def model(self) -> Any:
        """The run's model."""
        return self.run.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.run.tokenizer

    @property
    def options(self) -> dict[str, Any]:
        """How questions are written and answers decoded."""
        evaluation = self.recipe.evaluation
        return {
            "templates": self.run.templates,
            "max_new_tokens": evaluation.max_new_tokens,
            "batch_size": evaluation.batch_size,
            "progress": True,
        }

    def answer(self, examples: Sequence[Example]) -> AccuracyReport:
        """Answer the examples and judge the answers under the deciding rule."""
        return judge_answers(
            self.run.answerer(),
            examples,
            self.rows.task,
            batch_size=self.recipe.evaluation.batch_size,
            progress=True,
            separator=self.run.separator,
        )

    def read(self, examples: Sequence[Example], **options: Any) -> BlockReadouts:
        """Read out every block."""
        return collect_readouts(self.model, self.tokenizer, examples, self.rows.task, **{**self.options, **options})

    def longest_step(self) -> int:
        """Return the maximum tokens of a step or answer in the test rows, EOS included."""
        template = self.run.templates.step
        texts = [template.format(step=step) for example in self.rows.test for step in example.steps or ()]
        longest = max(len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        return max(longest + 1, self.recipe.evaluation.max_new_tokens)


def _measure_blocks(judge: _Judge, readouts: BlockReadouts | None) -> dict[str, Any]:
    """Score every block, and the ways to choose an answer from the blocks."""
    if readouts is None:
        return {"blocks": None, "selection": None, "probe": None}
    probe = fit_probe(judge.read(judge.rows.selection))
    chosen = {
        "final": select_final(*readouts.right.shape),
        "vote": select_by_vote(readouts.answers),
        "confidence": select_by_confidence(readouts.log_probs),
        "probe": select_by_score(probe.scores(readouts.states)),
    }
    scores = {way: readouts.chosen(blocks) for way, blocks in chosen.items()}
    any_block = readouts.any_block()
    final, best = scores["final"]["all"], any_block["all"]
    ways = [way for way in scores if way != "final"]
    return {
        "blocks": {
            "by_block": [{str(key): score.to_dict() for key, score in block.items()} for block in readouts.by_block()],
            "any_block": any_block["all"].to_dict(),
            "any_block_by_length": _by_length(any_block),
        },
        "selection": {
            **{way: found["all"].to_dict() for way, found in scores.items()},
            "any_block": any_block["all"].to_dict(),
            "gap_closed": {way: gap_closed(final, best, scores[way]["all"]) for way in ways},
            "by_length": {way: _by_length(found) for way, found in scores.items()},
        },
        "probe": {"auroc_by_block": auroc_by_block(probe, readouts), "num_training_rows": probe.num_training_rows},
    }


def _look_into(judge: _Judge, readouts: BlockReadouts | None) -> dict[str, Any]:
    """Measure what the blocks do, as far as the comparison asks for it."""
    found: dict[str, Any] = dict.fromkeys(("budget", "controls", "faithfulness", "representations"))
    if readouts is None:
        return found
    measures, rows = judge.comparison.measures, judge.rows
    grounding = judge.recipe.grounding if "grounding" in judge.recipe.stages else None
    ahead = READOUT_STEPS[(grounding or {}).get("readout_step", "next")]
    if measures.budget:
        found["budget"] = budget_curve(
            judge.model, judge.tokenizer, rows.test, rows.task, measures.budget, **judge.options
        )
    if measures.controls:
        controls = run_controls(
            judge.model,
            judge.tokenizer,
            rows.test,
            rows.task,
            counterfactual=ChainCounterfactual(rows.task) if isinstance(rows.task, ChainTask) else None,
            steps_ahead=ahead,
            **judge.options,
        )
        found["controls"] = [control.to_dict() for control in controls]
    grounded = judge.folder / "grounding" / "final.safetensors"
    if measures.faithfulness and grounded.exists() and any(example.steps for example in rows.test):
        with _weights(judge.run, read_tensors(grounded)):
            after_stage_1 = judge.read(rows.test, max_new_tokens=judge.longest_step())
        found["faithfulness"] = judge_steps(
            after_stage_1, rows.test, templates=judge.run.templates, tokenizer=judge.tokenizer, steps_ahead=ahead
        )
    if measures.representations:
        found["representations"] = {
            "blocks": block_components(readouts),
            "training": _components_over_training(judge),
        }
    return found


def _components_over_training(judge: _Judge) -> dict[str, Any] | None:
    """Project the states of 64 rows' blocks in the checkpoints that a run kept."""
    checkpoints = []
    for stage in judge.recipe.stages:
        folders = (judge.folder / stage).glob("checkpoint-*")
        for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1])):
            weights = folder / "adapter_model.safetensors"
            if weights.exists():
                checkpoints.append((stage, int(folder.name.split("-")[-1]), weights))
    states = []
    for stage, step, weights in checkpoints:
        with _weights(judge.run, read_tensors(weights)):
            states.append((stage, step, judge.read(judge.rows.selection[:64]).states))
    return training_components(states) if states else None


@contextmanager
def last_weights(planned: PlannedRun, run: Run) -> Iterator[Recipe]:
    """Temporarily give a trained run the weights from the end of its last stage; yields its recipe.

    Not the weights that validation liked best, which may come from different stages for different seeds.
    """
    if run.recipe is None:
        raise ValueError("run: must have been trained from a recipe, got an adapter without one.")
    if not planned.method.train:
        yield run.recipe
        return
    with _weights(run, read_tensors(last_file(planned, run.recipe))):
        yield run.recipe


def last_file(planned: PlannedRun, recipe: Recipe) -> Path:
    """Return the file with the weights from the end of a trained run's last stage."""
    return planned.folder / recipe.stages[-1] / "final.safetensors"


@contextmanager
def _weights(run: Run, weights: Mapping[str, Any]) -> Iterator[None]:
    """Temporarily give the adapter other weights."""
    name = run.model.active_adapter
    state = get_peft_model_state_dict(run.model, adapter_name=name)
    own = {key: tensor.detach().clone() for key, tensor in state.items()}
    set_peft_model_state_dict(run.model, dict(weights), adapter_name=name)
    try:
        yield
    finally:
        set_peft_model_state_dict(run.model, own, adapter_name=name)


def _training(run: Run) -> dict[str, Any] | None:
    if not run.record:
        return None
    return {**run.record["training"], "trainable_parameters": run.record["parameters"]["trainable"]}


def count_base(model: Any) -> int:
    """Count the parameters of an adapter's base, also where several share a stored number."""
    _, in_all = model.get_nb_trainable_parameters()  # of a 4-bit weight it counts what was packed
    return int(in_all) - sum(part.numel() for name, part in model.named_parameters() if "lora_" in name)


def _by_length(scores: Mapping[int | str, Score]) -> dict[str, dict[str, float]]:
    return {str(length): score.to_dict() for length, score in scores.items() if length != "all"}


def _length(example: Example) -> int | None:
    return len(example.steps) if example.steps else None
