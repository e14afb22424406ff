"""What makes training faster without a GPU: one change at a time to the small base's recipe."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.measure import Way, peak_memory, ratio, spread
from benchmarks.models import build_base
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row
from benchmarks.steps import rows_of_lengths, steps_on_batches
from rim_peft import RiMConfig

NUM_BLOCKS = 4
RANK = 16
PACK_LENGTH = 512
LENGTHS = [(24 + 9 * steps, [2] * steps, 2) for steps in (1, 2, 3, 4)]
"""Tokens of a prompt, of each step and of the answer: stories of one to four steps (recipes/potions/smollm2.yaml)."""


@dataclass(frozen=True)
class Choice:
    """One change to the recipe's adapter, stage or process."""

    text: str
    adapter: Callable[[int], dict[str, Any]] = lambda num_layers: {}
    stage: dict[str, Any] = field(default_factory=dict)
    num_threads: int | None = None
    batch_share: float = 1.0


def _upper(num_layers: int) -> dict[str, Any]:
    """Put LoRA on every linear layer of the upper half."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {"target_modules": names, "layers_to_transform": list(range(num_layers // 2, num_layers))}


CHOICES = (
    Choice("padded rows", stage={"pack_length": None}),
    Choice("half the batch", batch_share=1 / 2),
    Choice("one thread", num_threads=1),
    Choice("layers compiled", stage={"compile_layers": True}),
    Choice("rank 64", adapter=lambda _: {"r": 64}),
    Choice("gradient checkpointing", stage={"gradient_checkpointing": True}),
    Choice("LoRA on the upper half", adapter=_upper),
    Choice(
        "blocks and LoRA from the middle on", adapter=lambda layers: {**_upper(layers), "insertion_layer": layers // 2}
    ),
)


@benchmark("laptop", "stage 1 on SmolLM2-135M's shape with one choice changed, against its recipe: samples per second")
def run(settings: Settings) -> Iterator[Row]:
    """Time whole steps with and without each change, side by side, with random weights of the real shape."""
    name = settings.choose(quick="tiny", cpu="smollm2-135m", cuda="smollm2-135m")
    batch = settings.choose(quick=3, cpu=8, cuda=24)
    recipe = _step(settings, name, Choice("the recipe"), batch)
    for choice in CHOICES:
        if choice.stage.get("compile_layers") and not (shutil.which("g++") or shutil.which("clang++")):
            settings.tell(f"{choice.text} skipped: compiling takes a C++ compiler")
            continue
        settings.tell(f"{name}: {choice.text}")
        changed = _step(settings, name, choice, batch)
        ways = {"changed": _in_threads(changed, choice.num_threads), "recipe": recipe.way}
        samples = settings.time(ways)
        rates = {
            "changed": [changed.samples / seconds for seconds in samples["changed"]],
            "recipe": [recipe.samples / seconds for seconds in samples["recipe"]],
        }
        memory = peak_memory(changed.way, device=settings.device) / peak_memory(recipe.way, device=settings.device)
        yield Row(
            benchmark="laptop",
            case={"base": name, "changed": choice.text, "batch": changed.samples},
            ways=tuple(Measured(way, spread(rates[way]), "samples/s") for way in rates),  # type: ignore[arg-type]
            figure=ratio(rates["changed"], rates["recipe"]),
            figure_name="changed / recipe",
            bound=1.0,
            bound_text="the recipe's own speed",
            note=f"peak memory of a step {memory:.2f} times the recipe's",
            num_rounds=len(samples["changed"]),
        )


@dataclass(frozen=True)
class _Step:
    way: Way
    samples: int


def _step(settings: Settings, name: str, choice: Choice, batch: int) -> _Step:
    base = build_base(name, settings, weights="fp32")
    changes = choice.adapter(base.config.num_hidden_layers)
    model = get_peft_model(base, RiMConfig(**{"num_blocks": NUM_BLOCKS, "r": RANK, **changes}))
    samples = max(1, round(batch * choice.batch_share))
    rows = rows_of_lengths(model, [LENGTHS[row % len(LENGTHS)] for row in range(samples)])
    options = {"pack_length": PACK_LENGTH, **choice.stage}
    (step,) = steps_on_batches(model, "stage 1", rows, batch=samples, **options)
    return _Step(step, samples)


def _in_threads(step: _Step, num_threads: int | None) -> Way:
    """Run a step with this many threads, and restore the number afterwards."""
    if num_threads is None:
        return step.way

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            step.way()
        finally:
            torch.set_num_threads(before)

    return run
