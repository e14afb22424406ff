"""The tuner: configuration, memory rows, model and generation, registered with PEFT on import."""

from rim_peft.tuner.compatibility import check_swap
from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.layer import MemoryEmbedding
from rim_peft.tuner.model import RiMModel
from rim_peft.tuner.registration import RIM, check_swaps, override, register
from rim_peft.tuner.sharing import load_adapter, push_to_hub, save_pretrained, write_card

register(RiMConfig, RiMModel, MemoryEmbedding)
check_swaps(RiMConfig, check_swap)
override(
    RiMModel,
    load_adapter=load_adapter,
    save_pretrained=save_pretrained,
    create_or_update_model_card=write_card,
    push_to_hub=push_to_hub,
)

__all__ = ["RIM", "MemoryEmbedding", "RiMConfig", "RiMModel"]
