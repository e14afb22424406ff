"""How much memory a stage takes at its peak, by part, without weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import PeftModel

from rim_peft.data.collator import ReadoutCollator, TokenizedRow
from rim_peft.sequence import Layout
from rim_peft.training.head import Head
from rim_peft.training.optimizer_state import optimizer_bytes
from rim_peft.training.readout_trainer import ReadoutTrainer
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
    trainer: ReadoutTrainer,
    rows: Sequence[TokenizedRow],
    *,
    autocast: torch.dtype | None,
    device: str,
    head: Head = Head.FUSED,
) -> tuple[BatchSize, PeakMemory]:
    """Simulate a stage's step on a batch where all readouts count.

    Args:
        model: base and adapter on the device ``meta``; of no use afterwards.
        trainer: of the stage, without a model.
        rows: the batch, tokenised.
        autocast: type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``.
        head: what scores labels.
    """
    args = trainer.args
    kind: Any = args.gradient_checkpointing_kwargs or {}
    layout, weights = arrange(trainer, rows)
    prepare(model, trainer)
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


def prepare(model: PeftModel, trainer: ReadoutTrainer) -> None:
    """Make of a model what the stage's trainer makes of it: what is trained, and LoRA's dropout."""
    base_model: Any = model.base_model
    base_model.memory.rows(model.active_adapter).requires_grad_(trainer.trains_memory)
    if trainer.args.dropout is not None:
        base_model.set_dropout(trainer.args.dropout)


def arrange(trainer: ReadoutTrainer, rows: Sequence[TokenizedRow]) -> tuple[Layout, torch.Tensor]:
    """Return a batch's rows and its readouts' weights, as the trainer's loss arranges them where all of them count."""
    collator: ReadoutCollator = replace(trainer.make_collator(pad_id=0), block_range=None)  # the most blocks
    batch = collator(rows)
    num_steps = batch.pop("num_steps")
    layout = Layout(**batch)
    weights = trainer.block_weights(num_steps, (layout.block_ends >= 0).sum(dim=1), progress=None)
    return trainer.arrange(layout, weights), weights


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """Count trained and frozen numbers of a model on the device ``meta``, whose shapes are those before packing."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += math.prod(parameter.shape)
    return sizes[True], sizes[False]
