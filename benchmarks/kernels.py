"""Ways to run the same rows on a GPU: attention that skips masked pairs, and compiled layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.lengths import real_lengths
from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Row, above
from benchmarks.steps import rows_of_lengths, steps_on_batches

NUM_BLOCKS = 8
WAYS: dict[str, dict[str, Any]] = {
    "sdpa": {"attention": "sdpa"},
    "flex": {"attention": "flex_attention", "pad_to_multiple_of": 128},
    "compiled": {"attention": "sdpa", "compile_layers": True},
    "flex, compiled": {"attention": "flex_attention", "pad_to_multiple_of": 128, "compile_layers": True},
}


@benchmark("kernels", "on a GPU: stage 2 on packed rows with flex attention and compiled layers, against sdpa")
def run(settings: Settings) -> Iterator[Row]:
    """Time a step each way. Flex attention has no backward pass on a CPU, and compiling there is too slow."""
    if settings.device == "cpu":
        settings.tell("skipped: needs a GPU")
        return
    name, pack_length = "llama-3.2-1b", 1024
    steps = {}
    for way, options in WAYS.items():
        settings.tell(f"{name}, {way}")
        base = build_base(name, settings)
        base.set_attn_implementation(options["attention"])
        model = attach_rim(base, rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
        rows = rows_of_lengths(model, real_lengths()[:32])
        more = {key: value for key, value in options.items() if key != "attention"}
        (steps[way],) = steps_on_batches(model, "stage 2", rows, batch=32, pack_length=pack_length, **more)
    samples = settings.time({way: step.forward_and_backward for way, step in steps.items()})
    for way in list(WAYS)[1:]:
        yield Row.of_times(
            "kernels",
            {"base": name, "batch": 32, "pack_length": pack_length, "way": way},
            samples,
            (way, "sdpa"),
            bound=1.0,
            bound_text="as fast as sdpa with a dense mask",
            target=above(1.0, "faster than sdpa"),
        )
