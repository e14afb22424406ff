"""Reasoning in Memory. Source: arXiv 2605.30343."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rim_peft.methods.method import Method

if TYPE_CHECKING:
    from rim_peft.training.readout_trainer import ReadoutTrainer


class RiM(Method):
    """Memory blocks, trained by explicit grounding and then by implicit refinement."""

    name = "rim"
    stages = ("grounding", "refinement")
    description = "{blocks}"
    has_blocks = True

    def trainer(self, stage: str) -> type[ReadoutTrainer]:
        """Return the trainer of a stage."""
        from rim_peft.training import GroundingTrainer, RefinementTrainer

        return GroundingTrainer if stage == "grounding" else RefinementTrainer
