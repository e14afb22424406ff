"""Training both stages, and what they are compared with."""

from rim_peft.training.baseline_config import BaselineConfig
from rim_peft.training.baseline_trainer import BaselineTrainer
from rim_peft.training.coconut_config import CoconutConfig
from rim_peft.training.coconut_trainer import CoconutTrainer
from rim_peft.training.grounding_config import GroundingConfig
from rim_peft.training.grounding_trainer import GroundingTrainer
from rim_peft.training.refinement_config import RefinementConfig
from rim_peft.training.refinement_trainer import RefinementTrainer

__all__ = [
    "BaselineConfig",
    "BaselineTrainer",
    "CoconutConfig",
    "CoconutTrainer",
    "GroundingConfig",
    "GroundingTrainer",
    "RefinementConfig",
    "RefinementTrainer",
]
