"""The training speed of both stages, and its share of the machine's matrix peak."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.measure import Way, ratio, spread
from benchmarks.models import WEIGHTS, attach_rim, build_base, lora_rank
from benchmarks.operations import COUNTED, Operations, readout_pairs
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row
from benchmarks.steps import STAGES, RowSizes, TrainingStep, readout_step

NUM_BLOCKS = 8


@benchmark("train_step", "tokens per second of a training step of both stages, and its share of the matrix peak")
def run(settings: Settings) -> Iterator[Row]:
    """Time whole steps (forward, backward, optimiser) in turn with products of large matrices, for the current peak."""
    for name in settings.choose(quick=["tiny"], cpu=["small"], cuda=["gpt2-124m", "llama-3.2-1b", "llama-3.2-3b"]):
        sizes = settings.choose(
            quick=RowSizes(batch=1, prompt=16), cpu=RowSizes(batch=4, prompt=100), cuda=RowSizes(batch=32, prompt=100)
        )
        for weights in WEIGHTS:
            if weights == "nf4" and find_spec("bitsandbytes") is None:
                settings.tell("nf4 skipped: bitsandbytes is not installed")
                continue
            for checkpointing in (False, True):
                settings.tell(f"{name}, {weights}, checkpointing={'on' if checkpointing else 'off'}")
                yield from _rows(settings, name, weights, sizes, checkpointing=checkpointing)


def _rows(settings: Settings, name: str, weights: str, sizes: RowSizes, *, checkpointing: bool) -> Iterator[Row]:
    base = build_base(name, settings, weights=weights)
    model = attach_rim(base, rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
    steps = {stage: readout_step(model, stage, sizes, checkpointing=checkpointing) for stage in STAGES}
    product, product_operations = _matrix_product(settings)
    samples = settings.time({**steps, "matrices": product})
    peaks = [product_operations / seconds for seconds in samples["matrices"]]
    for stage, step in steps.items():
        operations = _operations(model, step, sizes, checkpointing=checkpointing)
        rates = [operations / seconds for seconds in samples[stage]]
        yield Row(
            benchmark="train_step",
            case={
                "base": name,
                "weights": weights,
                "checkpointing": "on" if checkpointing else "off",
                "stage": stage.removeprefix("stage "),
                "tokens": step.tokens,
            },
            ways=(
                Measured("step", spread([step.tokens / seconds for seconds in samples[stage]]), "tokens/s"),
                Measured("matrices", spread([peak / 1e9 for peak in peaks]), "GFLOP/s"),
            ),
            figure=ratio(rates, peaks),
            figure_name="share of the peak",
            bound=1.0,
            bound_text=f"operations of a product of {_peak_name(settings)} matrices in the same round; {COUNTED}",
            num_rounds=len(peaks),
        )


def _operations(model: Any, step: TrainingStep, sizes: RowSizes, *, checkpointing: bool) -> float:
    pairs = sizes.batch * readout_pairs(sizes.prompt, num_blocks=NUM_BLOCKS, readout=sizes.readout)
    return Operations.of(model).training_step(
        tokens=step.tokens, labels=step.labels, pairs=pairs, checkpointing=checkpointing
    )


def _matrix_product(settings: Settings) -> tuple[Way, float]:
    """Return a product of two square matrices and its operations, in float32 on the CPU and bfloat16 on CUDA."""
    size = settings.choose(quick=128, cpu=1536, cuda=8192)
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=settings.device, dtype=dtype) for _ in range(2))
    return partial(torch.mm, left, right), 2.0 * size**3


def _peak_name(settings: Settings) -> str:
    return "bfloat16" if settings.device == "cuda" else "float32"
