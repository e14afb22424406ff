"""Training both stages, and Coconut for comparison."""

from rim_peft.training.coconut_config import CoconutConfig
from rim_peft.training.coconut_trainer import CoconutTrainer
from rim_peft.training.grounding_config import GroundingConfig
from rim_peft.training.grounding_trainer import GroundingTrainer
from rim_peft.training.refinement_config import RefinementConfig
from rim_peft.training.refinement_trainer import RefinementTrainer

__all__ = [
    "CoconutConfig",
    "CoconutTrainer",
    "GroundingConfig",
    "GroundingTrainer",
    "RefinementConfig",
    "RefinementTrainer",
]
