"""How the cost of a training step grows with blocks, prompt and batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from benchmarks.measure import ratio
from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.operations import Operations, readout_pairs
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, at_most
from benchmarks.steps import RowSizes, TrainingStep, readout_step

PROMPT, NUM_BLOCKS = 64, 8


@benchmark("scaling", "stage 2's forward and backward when blocks, prompt or batch are doubled")
def run(settings: Settings) -> Iterator[Row]:
    """Time each size of a series in turn, and compare neighbours."""
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    batch = settings.choose(quick=1, cpu=2, cuda=4)
    series = {
        "K": settings.choose(quick=[1, 2], cpu=[2, 4, 8, 16], cuda=[2, 4, 8, 16]),
        "n": settings.choose(quick=[8, 16], cpu=[64, 128, 256, 512], cuda=[64, 128, 256, 512, 1024]),
        "batch": settings.choose(quick=[1, 2], cpu=[1, 2, 4, 8, 16], cuda=[1, 2, 4, 8, 16, 32]),
    }
    for axis, values in series.items():
        cases = [{"K": NUM_BLOCKS, "n": PROMPT, "batch": batch, axis: value} for value in values]
        settings.tell(f"{base}, {axis} = {', '.join(map(str, values))}")
        yield from _rows(settings, base, axis, cases)


def _rows(settings: Settings, base: str, axis: str, cases: list[dict[str, int]]) -> Iterator[Row]:
    models: dict[int, Any] = {}  # by the number of blocks, which belongs to the adapter
    for case in cases:
        if case["K"] not in models:
            model = build_base(base, settings)
            models[case["K"]] = attach_rim(model, rank=lora_rank(settings), num_blocks=case["K"])
    sizes = [RowSizes(batch=case["batch"], prompt=case["n"]) for case in cases]
    steps = [readout_step(models[case["K"]], "stage 2", size) for case, size in zip(cases, sizes, strict=True)]
    names = [str(case[axis]) for case in cases]
    samples = settings.time({name: step.forward_and_backward for name, step in zip(names, steps, strict=True)})
    counted = [_operations(step, case) for step, case in zip(steps, cases, strict=True)]
    for before, after in pairwise(range(len(cases))):
        tokens = steps[after].tokens / steps[before].tokens
        yield Row(
            benchmark="scaling",
            case={"base": base, **cases[after], axis: f"{names[before]}->{names[after]}"},
            ways=(
                Measured.milliseconds("doubled", samples[names[after]]),
                Measured.milliseconds("before", samples[names[before]]),
            ),
            figure=ratio(samples[names[after]], samples[names[before]]),
            figure_name="doubled / before",
            bound=counted[after] / counted[before],
            bound_text="counted operations, which are linear in tokens but for attended pairs",
            target=at_most(1.1),
            num_rounds=len(samples[names[after]]),
            note=f"tokens grow {tokens:.2f} times, from {steps[before].tokens} to {steps[after].tokens}",
        )


def _operations(step: TrainingStep, case: dict[str, int]) -> float:
    readout = RowSizes.readout
    pairs = case["batch"] * readout_pairs(case["n"], num_blocks=case["K"], readout=readout)
    return Operations.of(step.trainer.model).training_step(tokens=step.tokens, labels=step.labels, pairs=pairs)
