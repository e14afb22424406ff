"""The tuner: configuration, memory rows, model and generation, registered with PEFT on import."""

from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.layer import MemoryEmbedding
from rim_peft.tuner.model import RiMModel
from rim_peft.tuner.registration import RIM, register

register(RiMConfig, RiMModel, MemoryEmbedding)

__all__ = ["RIM", "MemoryEmbedding", "RiMConfig", "RiMModel"]
