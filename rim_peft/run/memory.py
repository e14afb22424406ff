"""How much memory a stage takes at its peak, by part, without weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel

from rim_peft.data.collator import TokenizedRow
from rim_peft.data.objective import Objective
from rim_peft.sequence import Layout
from rim_peft.training.head import Head
from rim_peft.training.optimizer_state import optimizer_bytes
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import arrange_rows
from rim_peft.training.simulation import StepMemory, simulate_step


@dataclass(frozen=True)
class BatchSize:
    """A batch as it goes through the model: ``samples`` in ``rows`` rows of ``length`` tokens, padding included."""

    samples: int
    rows: int
    length: int


@dataclass(frozen=True)
class PeakMemory(StepMemory):
    """Bytes that training holds at its peak: all of a step's parts, and what the optimiser keeps.

    Attributes:
        optimizer: its state; None where it is not known, and then not in the total.
    """

    optimizer: int | None

    @property
    def total(self) -> int:
        """All parts of the peak together."""
        return self.weights + self.adapter + (self.optimizer or 0) + self.step


def precision(values: dict[str, Any], *, device: str) -> torch.dtype | None:
    """Return the type of a stage's mixed precision on a device, None for none.

    Args:
        values: what the recipe gives of the stage; bf16 is on where a GPU has it unless it is set.
        device: ``"cuda"`` or ``"cpu"``; a GPU that is not here is one with bf16.
    """
    if values.get("fp16"):
        return torch.float16
    bf16 = values.get("bf16")
    if bf16 is None:
        bf16 = device == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    return torch.bfloat16 if bf16 else None


def estimate(
    model: PeftModel,
    objective: Objective,
    args: ReadoutConfig,
    rows: Sequence[TokenizedRow],
    *,
    autocast: torch.dtype | None,
    device: str,
    head: Head = Head.FUSED,
) -> tuple[BatchSize, PeakMemory]:
    """Simulate a stage's step on a batch where all readouts count.

    Args:
        model: base and adapter on the device ``meta``; of no use afterwards.
        objective: what the stage trains of a row.
        args: the stage's options.
        rows: the batch, tokenised.
        autocast: type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``.
        head: what scores labels.
    """
    kind: Any = args.gradient_checkpointing_kwargs or {}
    layout, weights = arrange(objective, args, rows)
    prepare(model, objective, args)
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    found = simulate_step(
        model,
        layout,
        weights,
        checkpointing=bool(args.gradient_checkpointing),
        reentrant=kind.get("use_reentrant"),
        autocast=autocast,
        accumulates=args.gradient_accumulation_steps > 1,
        on_gpu=device == "cuda",
        head=head,
    )
    has_momentum = "momentum" in (args.optim_args or "")
    optimizer = optimizer_bytes(str(getattr(args.optim, "value", args.optim)), shapes, has_momentum=has_momentum)
    num_rows, length = layout.input_ids.shape
    return BatchSize(len(rows), num_rows, length), PeakMemory(optimizer=optimizer, **asdict(found))


def prepare(model: PeftModel, objective: Objective, args: ReadoutConfig) -> None:
    """Make of a model what the stage's trainer makes of it: what is trained, and LoRA's dropout."""
    base_model: Any = model.base_model
    base_model.memory.rows(model.active_adapter).requires_grad_(objective.trains_memory)
    if args.dropout is not None:
        base_model.set_dropout(args.dropout)


def arrange(objective: Objective, args: ReadoutConfig, rows: Sequence[TokenizedRow]) -> tuple[Layout, torch.Tensor]:
    """Return a batch's rows and its readouts' weights, as the trainer's loss arranges them where all of them count."""
    batch = objective.collator(pad_id=0)(rows)
    num_steps = batch.pop("num_steps")
    layout = Layout(**batch)
    weights = objective.weights(num_steps, (layout.block_ends >= 0).sum(dim=1), progress=None)
    return arrange_rows(args, layout, weights), weights


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """Count trained and frozen numbers of a model on the device ``meta``, whose shapes are those before packing."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += math.prod(parameter.shape)
    return sizes[True], sizes[False]
