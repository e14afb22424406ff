"""Positions of tokens in rows and attention masks: plain torch, no model, no tokenizer."""

from typing import Any

from rim_peft.old_names import find_moved
from rim_peft.sequence.layout import (
    IGNORE_INDEX,
    BlockTokens,
    Labels,
    Layout,
    Sample,
    build_layout,
)
from rim_peft.sequence.masks import branching_mask
from rim_peft.sequence.packing import keep_readouts, pack_rows

__all__ = [
    "IGNORE_INDEX",
    "BlockTokens",
    "Labels",
    "Layout",
    "Sample",
    "branching_mask",
    "build_layout",
    "keep_readouts",
    "pack_rows",
]


def __getattr__(name: str) -> Any:
    return find_moved(__name__, name)
