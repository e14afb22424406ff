"""The tuner: configuration, memory rows, model and generation, registered with PEFT on import."""

from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.files import check_config
from rim_peft.tuner.fit import check_swap
from rim_peft.tuner.memory_embedding import MemoryEmbedding
from rim_peft.tuner.model import RiMModel
from rim_peft.tuner.peft_plugin import RIM, check_reading, check_swaps, guard_loading, override, register
from rim_peft.tuner.sharing import (
    load_adapter,
    load_natively,
    load_pretrained,
    push_to_hub,
    save_pretrained,
    write_card,
)
from rim_peft.tuner.tensors import check_checksum, check_tensors

register(RiMConfig, RiMModel, MemoryEmbedding)
check_swaps(RiMConfig, check_swap, check_tensors)
check_reading(check_config, check_checksum)
guard_loading(load_pretrained, load_natively)
override(
    RiMModel,
    load_adapter=load_adapter,
    save_pretrained=save_pretrained,
    create_or_update_model_card=write_card,
    push_to_hub=push_to_hub,
)

__all__ = ["RIM", "MemoryEmbedding", "RiMConfig", "RiMModel"]
