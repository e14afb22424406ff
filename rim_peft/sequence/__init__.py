"""Positions of tokens in rows and attention masks: plain torch, no model, no tokenizer."""

from rim_peft.sequence.layout import (
    IGNORE_INDEX,
    BlockTokens,
    Labels,
    Layout,
    Sample,
    build_layout,
)
from rim_peft.sequence.masks import attention_masks, branching_mask, check_architecture
from rim_peft.sequence.packing import keep_readouts, pack_rows

__all__ = [
    "IGNORE_INDEX",
    "BlockTokens",
    "Labels",
    "Layout",
    "Sample",
    "attention_masks",
    "branching_mask",
    "build_layout",
    "check_architecture",
    "keep_readouts",
    "pack_rows",
]
