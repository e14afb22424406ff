"""The tuner: configuration, memory rows, model and generation, registered with PEFT on import."""

from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.layer import MemoryEmbedding
from rim_peft.tuner.model import RiMModel
from rim_peft.tuner.registration import RIM, override, register
from rim_peft.tuner.sharing import load_adapter, push_to_hub, write_card

register(RiMConfig, RiMModel, MemoryEmbedding)
override(RiMModel, load_adapter=load_adapter, create_or_update_model_card=write_card, push_to_hub=push_to_hub)

__all__ = ["RIM", "MemoryEmbedding", "RiMConfig", "RiMModel"]
