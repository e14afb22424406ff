"""Several samples per row against one, at real lengths; and the gain of dropping readouts of weight 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.lengths import real_lengths
from benchmarks.measure import Spread
from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, above, at_least, below
from benchmarks.steps import TrainingStep, rows_of_lengths, steps_on_batches

NUM_BLOCKS = 8


@benchmark("packing", "both stages on GSM8K's lengths: rows of several samples against padded and grouped batches")
def run_packing(settings: Settings) -> Iterator[Row]:
    """Train on the same samples in the same batches, packed and padded, and in batches of samples of similar length.

    Stage 1 is the paper's, with one block per step, so its rows differ most in length; stage 2 has all blocks in every
    row.
    """
    base = settings.choose(quick="tiny", cpu="wide", cuda="llama-3.2-1b")
    lengths = real_lengths()[: settings.choose(quick=16, cpu=64, cuda=64)]
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
    rows = rows_of_lengths(model, lengths)
    # As long as in the recipes for this width: longer rows have less padding and more attention.
    options = {
        "batch": settings.choose(quick=8, cpu=32, cuda=32),
        "pack_length": settings.choose(quick=256, cpu=384, cuda=512),
    }
    for stage, more in (("stage 1", {"trailing_blocks": False}), ("stage 2", {})):
        settings.tell(f"{base}, {stage}, {len(rows)} rows, {options}")
        plain = {"batch": options["batch"], **more}
        padded = steps_on_batches(model, stage, rows, **plain)
        by_length = sorted(range(len(rows)), key=lambda row: _tokens_of(padded, row))
        ways = {
            "packed": steps_on_batches(model, stage, rows, **options, **more),
            "padded": padded,
            "grouped": steps_on_batches(model, stage, rows.select(by_length), **plain),
        }
        _check_same_gradients(ways["packed"][0], ways["padded"][0])
        yield from _packing_rows(settings, {"base": base, "stage": stage, "samples": len(rows), **options}, ways)


def _packing_rows(settings: Settings, case: dict[str, Any], ways: dict[str, list[TrainingStep]]) -> Iterator[Row]:
    padding = {name: _padding(steps) for name, steps in ways.items()}
    samples = settings.time({name: _each(steps) for name, steps in ways.items()})
    yield Row(
        benchmark="packing",
        case=case,
        ways=(_share("packed", padding["packed"]), _share("padded", padding["padded"])),
        figure=_exact(padding["packed"]),
        figure_name="padding of all tokens",
        bound=0.0,
        bound_text="no padding",
        target=below(0.05, "under 5 % of the tokens"),
        note=f"{sum(step.tokens for step in ways['packed'])} tokens; grouped: {padding['grouped']:.3f}",
    )
    for other in ("padded", "grouped"):
        yield Row.of_times(
            "packing",
            case,
            samples,
            ("packed", other),
            bound=(1 - padding["packed"]) / (1 - padding[other]),
            bound_text="tokens of the rows with padding, the other way / packed",
            target=above(1.3, "at least 1.3 times the throughput") if other == "padded" else None,
        )


@benchmark("annealed", "stage 1 with readouts of weight 0 left out of the rows, against computing them")
def run_annealed(settings: Settings) -> Iterator[Row]:
    """Advance through stage 1: with eight steps and blocks, block ``t`` has weight 0 after ``t/8`` of the stage."""
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    batch = settings.choose(quick=2, cpu=4, cuda=8)
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
    rows = rows_of_lengths(model, [(64, [12] * NUM_BLOCKS, 12)] * batch)
    for progress in settings.choose(quick=(0.5,), cpu=(0.25, 0.5, 0.75), cuda=(0.25, 0.5, 0.75)):
        settings.tell(f"{base}, {progress:.0%} of the stage")
        ways = {}
        for name in ("left out", "computed"):
            (step,) = steps_on_batches(model, "stage 1", rows, batch=batch)
            state = step.trainer.state
            state.global_step = int(progress * state.max_steps)
            if name == "computed":
                step.trainer.arrange = lambda layout, weights: layout
            ways[name] = step
        left_out, computed = (_row_tokens_of(ways[name]) for name in ("left out", "computed"))
        _check_same_gradients(ways["left out"], ways["computed"])
        samples = settings.time({name: step.forward_and_backward for name, step in ways.items()})
        yield Row.of_times(
            "annealed",
            {"base": base, "K": NUM_BLOCKS, "readout": 12, "n": 64, "batch": batch, "progress": progress},
            samples,
            ("left out", "computed"),
            bound=computed / left_out,
            bound_text="tokens with all readouts / tokens that are left",
            target=at_least(0.9),
        )


def _tokens_of(steps: list[TrainingStep], row: int) -> int:
    """Return the tokens of the ``row``-th sample over all batches."""
    counts = [count for step in steps for count in step.batch["attention_mask"].sum(1).tolist()]
    return int(counts[row])


def _each(steps: list[TrainingStep]) -> Any:
    def run() -> None:
        for step in steps:
            step.forward_and_backward()

    return run


def _shape(step: TrainingStep) -> tuple[int, int]:
    """Return the number of rows and the tokens per row that the model gets."""
    shapes: list[tuple[int, int]] = []
    memory = step.trainer.model.base_model.memory
    hook = memory.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        step.loss()
    hook.remove()
    return shapes[0]


def _row_tokens_of(step: TrainingStep) -> int:
    rows, length = _shape(step)
    return rows * length


def _padding(steps: list[TrainingStep]) -> float:
    return 1 - sum(step.tokens for step in steps) / sum(_row_tokens_of(step) for step in steps)


def _share(name: str, share: float) -> Measured:
    return Measured(name, _exact(share), "of tokens")


def _exact(value: float) -> Spread:
    return Spread(value, value, value)


def _check_same_gradients(ours: TrainingStep, theirs: TrainingStep) -> None:
    """Check that both ways compute the same; otherwise they would not be worth comparing."""
    gradients = []
    for step in (ours, theirs):
        step.model.zero_grad(set_to_none=True)
        step.loss().backward()
        found = [p.grad.float().flatten() for p in step.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
        step.model.zero_grad(set_to_none=True)
    difference = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    if difference > (0.05 if ours.trainer.args.bf16 else 1e-4):  # sums run in another order
        raise RuntimeError(f"both ways must have the same gradients, they differ by {difference:.2g} of their norm.")
