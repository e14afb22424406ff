"""Stage 2, implicit refinement: every block's readout is the answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from rim_peft.data.collator import refinement_readouts
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.training.refinement_config import RefinementConfig
from rim_peft.training.schedules import refinement_weights


class RefinementTrainer(ReadoutTrainer):
    """Trains ``L2 = - sum_k alpha_k · log p(y | x, m_<=k)``, ``alpha_k = 2k / (K (K + 1))``.

    Steps are not needed. See :class:`ReadoutTrainer` for the arguments.

    Source: arXiv 2605.30343.
    """

    config_class = RefinementConfig
    needs_steps = False
    args: RefinementConfig

    def readouts(self) -> Callable[..., list[list[int]]]:
        """Read the answer out after every block."""
        return partial(refinement_readouts, num_blocks=self.min_blocks)

    def block_weights(self, num_steps: Tensor, num_blocks: Tensor, *, progress: float | None) -> Tensor:
        """Return ``alpha_k``, the same for every sample of a batch."""
        weights = refinement_weights(int(num_blocks.max())).to(num_blocks.device)
        return weights.expand(len(num_blocks), -1)
