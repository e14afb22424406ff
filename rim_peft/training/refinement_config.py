"""Options of stage 2, implicit refinement."""

from __future__ import annotations

from dataclasses import dataclass, field

from rim_peft.training.readout_config import ReadoutConfig


@dataclass
class RefinementConfig(ReadoutConfig):
    """Options of :class:`~rim_peft.training.refinement_trainer.RefinementTrainer`.

    The number of blocks is the adapter's own, ``RiMConfig.num_blocks``, unless ``block_range`` is given.
    """

    reset_optimizer: bool = field(
        default=True,
        metadata={
            "help": "Start from a new optimiser, as the paper does. false: go on with the moments that stage 1's "
            "optimiser ended with; the learning rate and its schedule are this stage's own all the same."
        },
    )
