"""Training both stages."""

from rim_peft.training.grounding_config import GroundingConfig
from rim_peft.training.grounding_trainer import GroundingTrainer
from rim_peft.training.refinement_config import RefinementConfig
from rim_peft.training.refinement_trainer import RefinementTrainer

__all__ = ["GroundingConfig", "GroundingTrainer", "RefinementConfig", "RefinementTrainer"]
