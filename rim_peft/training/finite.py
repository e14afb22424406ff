"""Whether a training's losses, gradients and weights are still finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from rim_peft.tuner.tensors import not_finite

_REMEDY = (
    "Nothing of it was saved. Lower learning_rate, set warmup_steps, keep max_grad_norm at 1 or less, or omit "
    "fp16, and start again in another output_dir."
)


class DivergedError(ValueError):
    """The training's loss, gradients or weights are no longer finite."""

    def __init__(self, stage: str, found: str) -> None:
        super().__init__(f"{stage}: loss, gradients and weights must stay finite, {found}. {_REMEDY}")


class LossWatch:
    """Records the first loss that is not finite, on the device, so that no step has to sync."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # its step and value; step 0 while there is none

    def add(self, loss: Tensor, *, step: int) -> None:
        """Check the loss of a step, counted from 1."""
        loss = loss.detach().float()
        found = torch.stack([torch.where(loss.isfinite(), 0.0, float(step)), loss])
        self._first = found if self._first is None else torch.where(self._first[0] > 0, self._first, found)

    def first(self, accelerator: Accelerator) -> tuple[int, float] | None:
        """Return step and value of the first one in any process; every process must call it."""
        if self._first is None:
            return None
        found = accelerator.gather(self._first[None]).tolist()
        return min(((int(step), value) for step, value in found if step), default=None)


def check_logged(logs: Mapping[str, float], *, stage: str, step: int, may_skip: bool) -> None:
    """Check the losses and the gradient norm of a log line.

    Args:
        may_skip: whether steps with infinite gradients are skipped, as fp16 loss scaling does.

    Raises:
        DivergedError: one is not finite.
    """
    for name, value in logs.items():
        is_loss = name in ("loss", "train_loss", "eval_loss")  # not one that the user's `validate` returns
        if (is_loss or (name == "grad_norm" and not may_skip)) and not math.isfinite(value):
            raise DivergedError(stage, f"{name} at step {step} is {value}")


def check_weights(model: nn.Module, accelerator: Accelerator, *, stage: str, step: int) -> None:
    """Check all trained weights; every process must call it.

    Raises:
        DivergedError: one is not finite.
    """
    parts = _trained(model)
    # The largest absolute value is finite if all values are, and needs only a few kernels for all tensors.
    is_finite = get_total_norm(parts.values(), norm_type=math.inf).isfinite() if parts else torch.tensor(True)
    flag = is_finite.to(accelerator.device, torch.int32)
    if not accelerator.gather(flag[None]).all():
        found = diverged_part(model) or "one in another process is not"
        raise DivergedError(stage, f"of the weights after step {step} {found}")


def diverged_part(model: nn.Module) -> str | None:
    """Return which of this process's trained weights is not finite, and its value; None if all are finite."""
    return not_finite(_trained(model))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Return this process's part of the trained parameters."""
    whole = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    parts = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in whole.items()}
    return {name: part for name, part in parts.items() if part.numel()}
