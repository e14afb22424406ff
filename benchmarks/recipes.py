"""The needs of the one-GPU recipes at real shapes: simulated memory and counted operations, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread
from benchmarks.models import CONFIGS
from benchmarks.operations import COUNTED, Operations, causal_pairs
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row
from rim_peft.data.objective import TokenizedRow
from rim_peft.recipe import Recipe, load_recipe
from rim_peft.run.at_hand import MetaBase
from rim_peft.run.costs import estimate, precision
from rim_peft.tuner.config import active_config

FOLDER = Path(__file__).parents[1] / "recipes"
ASSUMED_RATE = 60e12
"""Assumed, not measured, operations per second of a GPU, for the hours."""
_GIB = 2**30

SHAPES = {
    "openai-community/gpt2": "gpt2-124m",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
    "Qwen/Qwen3-1.7B-Base": "qwen3-1.7b",
    "google/gemma-3-1b-pt": "gemma-3-1b",
}
"""The config with the shapes of each recipe's base."""

Lengths = tuple[int, list[int], int]
"""Tokens of a row's prompt, of each of its steps, and of its answer."""


@dataclass(frozen=True)
class TaskRows:
    """A task's training rows: their number, an average row for the time, and a long one for the memory."""

    count: int
    average: Lengths
    long: Lengths


ROWS = {
    "whynlp/gsm8k-aug": TaskRows(385_620, (54, [6, 7, 7], 2), (92, [8] * 6, 2)),
    "gsm8k": TaskRows(6_853, (58, [6, 7, 7], 2), (99, [8] * 6, 2)),
    "math": TaskRows(7_000, (75, [28] * 7, 8), (200, [40] * 16, 20)),
    "strategyqa": TaskRows(1_911, (15, [17] * 3, 2), (21, [30] * 4, 2)),
    "logiqa": TaskRows(7_376, (186, [], 2), (284, [], 2)),
}
"""By ``data.path`` or ``data.task``. Lengths were counted with a byte-level BPE of 8,192 tokens on the authors' files
(validation rows of GSM8K-Aug and LogiQA); long rows are at the 95 % quantile. Other tokenizers differ a little. MATH is
a guess."""


@benchmark("recipes", "the one-GPU recipes: memory simulated at the bases' real shapes, operations counted")
def run(settings: Settings) -> Iterator[Row]:
    """Estimate a GPU's memory at the beginning of each recipe's larger stage, and count all steps of both stages."""
    paths = sorted(FOLDER.glob("*/*lora.yaml"))
    for path in [path for path in paths if "gpt2" in path.name] if settings.quick else paths:
        recipe = load_recipe(path)
        settings.tell(path.name)
        weights = recipe.model.quantization or "bf16"
        other = "bf16" if recipe.model.quantization else "nf4"
        peaks = {name: _peak(recipe, name) / _GIB for name in (weights, other)}
        share, operations = peaks[weights] / peaks[other], _operations(recipe)
        yield Row(
            benchmark="recipes",
            case={"recipe": str(path.relative_to(FOLDER))},
            ways=(_gibibytes(weights, peaks[weights]), _gibibytes(other, peaks[other])),
            figure=Spread(share, share, share),
            figure_name=f"peak, {weights} / {other}",
            bound=1.0,
            bound_text="the same peak",
            note=f"{operations:.1e} operations ({COUNTED}): {operations / ASSUMED_RATE / 3600:.1f} h at "
            f"{ASSUMED_RATE / 1e12:.0f} TFLOP/s, which is assumed",
        )


def _gibibytes(name: str, size: float) -> Measured:
    return Measured(name, Spread(size, size, size), "GiB")


def _peak(recipe: Recipe, weights: str) -> int:
    """Return the peak bytes that ``rim-peft check --device cuda`` would report with a batch of long rows."""
    recipe, row = _with_weights(recipe, weights), _row(_rows(recipe).long)
    peaks = []
    for stage, (trainer_class, args) in zip(recipe.stages, recipe.stage_trainers(anywhere=True), strict=True):
        model = _base(recipe).attach()
        objective = trainer_class.objective_of(args, active_config(model))
        batch = [row] * args.per_device_train_batch_size
        autocast = precision(getattr(recipe, stage), device="cuda")
        peaks.append(estimate(model, objective, args, batch, autocast=autocast, device="cuda")[1].total)
    return max(peaks)


def _with_weights(recipe: Recipe, weights: str) -> Recipe:
    """Return the recipe with other weights of its base: ``"nf4"``, ``"int8"``, or ``"bf16"`` for full weights."""
    changes: dict[str, Any] = {"dtype": "bfloat16", "quantization": None if weights == "bf16" else weights}
    return replace(recipe, model=replace(recipe.model, **changes))


def _base(recipe: Recipe) -> MetaBase:
    """Return the recipe's base without weights, as on a GPU with bf16."""
    return MetaBase(CONFIGS[SHAPES[str(recipe.model.name_or_path)]](), recipe, has_bf16=True)


def _row(lengths: Lengths) -> TokenizedRow:
    prompt, steps, answer = lengths
    return {"prompt_ids": [3] * prompt, "step_ids": [[3] * step for step in steps], "answer_ids": [3] * answer}


def _operations(recipe: Recipe) -> float:
    """Return the operations of all steps of both stages on average rows, with stage 1's initial weights."""
    model = _base(_with_weights(recipe, "bf16")).attach()
    config = active_config(model)
    rows, sizes = _rows(recipe), Operations.of(model)
    row, prompt, block = _row(rows.average), rows.average[0], config.block_tokens.length
    total = 0.0
    for trainer_class, args in recipe.stage_trainers(anywhere=True):
        readouts = trainer_class.objective_of(args, config).readouts(row)
        lengths = [len(readout) for readout in readouts]
        trunk = prompt + block * len(lengths)
        pairs = causal_pairs(trunk) + sum(
            length * (prompt + index * block) + causal_pairs(length) for index, length in enumerate(lengths, start=1)
        )
        sample = sizes.training_step(
            tokens=trunk + sum(lengths),
            labels=sum(lengths),
            pairs=pairs,
            checkpointing=bool(args.gradient_checkpointing),
        )
        total += rows.count * args.num_train_epochs * sample
    return total


def _rows(recipe: Recipe) -> TaskRows:
    return ROWS[recipe.data.path if recipe.data.path in ROWS else recipe.data.task]
