"""Stage 1, explicit grounding: each block's readout is the next reasoning step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rim_peft.data.collator import grounding_readouts
from rim_peft.training.grounding_config import GroundingConfig
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.training.schedules import grounding_weights, phase_at


class GroundingTrainer(ReadoutTrainer):
    """Trains ``L1 = - sum_t lambda_t(s) · log p(r_{t+1} | x, m_<=t)``, where ``r_{T+1}`` is the answer.

    Rows must have steps. See :class:`ReadoutTrainer` for the arguments.

    Source: arXiv 2605.30343.
    """

    config_class = GroundingConfig
    needs_steps = True
    args: GroundingConfig

    @property
    def min_blocks(self) -> int:
        """The adapter's blocks with trailing blocks; else a row has one block for each of its steps."""
        return super().min_blocks if self.args.trailing_blocks else 0

    def readouts(self) -> Callable[..., list[list[int]]]:
        """Steps from the second on, then the answer once or, with trailing blocks, to the last block."""
        return partial(grounding_readouts, num_blocks=self.min_blocks)

    def block_weights(self, num_steps: Tensor, num_blocks: Tensor, *, progress: float | None) -> Tensor:
        """Return ``lambda_t(s)``; in a curriculum's phase of short chains, 0 for blocks beyond the longest of them."""
        shares = self.args.length_shares
        phase = None if shares is None or progress is None else phase_at(progress, shares)
        used = num_blocks
        if shares is not None and phase is not None and phase + 1 < len(shares):
            used = torch.minimum(num_blocks, num_steps.clamp(min=phase + 1))
        weights = grounding_weights(
            num_steps, used, progress=progress or 0.0, schedule=self.args.schedule, hold=self.args.hold
        )
        return functional.pad(weights, (0, int(num_blocks.max()) - weights.shape[1]))
