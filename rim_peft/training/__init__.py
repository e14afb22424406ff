"""Trainers for both stages and for the baselines."""

from rim_peft.training.baseline import BaselineConfig, BaselineTrainer
from rim_peft.training.coconut import CoconutConfig, CoconutTrainer
from rim_peft.training.rim import GroundingConfig, GroundingTrainer, RefinementConfig, RefinementTrainer

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
