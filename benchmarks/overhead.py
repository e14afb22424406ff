"""The time of a training step outside the model: rows, masks, and reading data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.lengths import real_lengths
from benchmarks.measure import Way, ratio, repeated, spread
from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, below
from benchmarks.steps import TrainingStep, rows_of_lengths, steps_on_batches
from rim_peft.sequence import Layout
from rim_peft.training.readout_trainer import arrange_rows
from rim_peft.tuner.bases import attention_masks

NUM_BLOCKS = 8
_TIMES = 10
"""Repetitions of a short way for one reading of the clock."""


@benchmark("mask", "arranging the rows of a batch and building their mask on the device, as share of a training step")
def run_mask(settings: Settings) -> Iterator[Row]:
    """Time what each step does with its batch before the model runs: weights, rows, labels, copies, mask."""
    for pack_length in (None, 512):
        step, case = _step(settings, pack_length)
        yield _share_of_step(
            settings, "mask", case, step, ("rows and mask", partial(_arrange, step)), 0.02, "under 2 % of the step"
        )


@benchmark("data", "reading and collating a batch, as share of a training step")
def run_data(settings: Settings) -> Iterator[Row]:
    """Time the data loader's work for each batch: rows from the table, laid out as tensors."""
    step, case = _step(settings, None)
    dataset, collator = step.trainer.train_dataset, step.trainer.data_collator
    indices = list(range(case["batch"]))

    def read() -> None:
        collator(dataset.__getitems__(indices))

    yield _share_of_step(settings, "data", case, step, ("reading", read), 0.05, "under 5 % of the step")


def _step(settings: Settings, pack_length: int | None) -> tuple[TrainingStep, dict[str, Any]]:
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    batch = settings.choose(quick=4, cpu=16, cuda=32)
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
    rows = rows_of_lengths(model, real_lengths()[:batch])
    settings.tell(f"{base}, batch={batch} pack_length={pack_length}")
    (step,) = steps_on_batches(model, "stage 1", rows, batch=batch, pack_length=pack_length)
    return step, {"base": base, "batch": batch, "pack_length": pack_length}


def _arrange(step: TrainingStep) -> None:
    """Run the first half of ``compute_loss``."""
    trainer, batch = step.trainer, step.batch
    layout = Layout(**{name: value for name, value in batch.items() if name != "num_steps"})
    weights = trainer.objective.weights(batch["num_steps"], (layout.block_ends >= 0).sum(1), progress=0.0)
    layout = arrange_rows(trainer.args, layout, weights)
    labels = layout.labels()
    layout, labels = layout.to(trainer.args.device), labels.to(trainer.args.device)
    base = trainer.model.get_base_model()
    attention_masks(base.config, layout, dtype=base.get_output_embeddings().weight.dtype)


def _share_of_step(
    settings: Settings,
    name: str,
    case: dict[str, Any],
    step: TrainingStep,
    part: tuple[str, Way],
    most: float,
    text: str,
) -> Row:
    label, way = part
    samples = settings.time({label: repeated(way, _TIMES), "step": step})
    once = [seconds / _TIMES for seconds in samples[label]]
    return Row(
        benchmark=name,
        case=case,
        ways=(Measured.milliseconds(label, once), Measured("step", spread([1000 * s for s in samples["step"]]), "ms")),
        figure=ratio(once, samples["step"]),
        figure_name="share of a step",
        bound=0.0,
        bound_text="nothing beside the model",
        target=below(most, text),
        num_rounds=len(once),
    )
