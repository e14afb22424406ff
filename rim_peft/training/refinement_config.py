"""Options of stage 2, implicit refinement."""

from __future__ import annotations

from dataclasses import dataclass

from rim_peft.training.readout_config import ReadoutConfig


@dataclass
class RefinementConfig(ReadoutConfig):
    """Options of :class:`~rim_peft.training.refinement_trainer.RefinementTrainer`.

    The number of blocks is the adapter's own, ``RiMConfig.num_blocks``.
    """
