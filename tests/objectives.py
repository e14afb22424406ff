"""Objectives in a few words, and rows prepared for them."""

from __future__ import annotations

from typing import Any

from rim_peft.data.objective import Objective
from rim_peft.data.preparation import prepare_dataset
from rim_peft.sequence import BlockTokens
from rim_peft.training.rim import Grounding, Refinement

_NO_LIMIT = 1 << 30


def make_objective(
    *, needs_steps: bool = True, num_blocks: int = 0, block_length: int = 4, vocab_size: int = _NO_LIMIT
) -> Objective:
    """Stage 1's objective, or stage 2's; ids of the base's vocabulary are below ``vocab_size``."""
    blocks = BlockTokens(vocab_size, vocab_size + 1, vocab_size + 2, block_size=block_length - 2)
    return (Grounding if needs_steps else Refinement)(blocks, num_blocks)


def prepare_rows(dataset: Any, tokenizer: Any, **options: Any) -> Any:
    """``prepare_dataset`` for the objective that some of the options describe."""
    names = ("needs_steps", "num_blocks", "block_length", "vocab_size")
    objective = make_objective(**{name: options.pop(name) for name in names if name in options})
    return prepare_dataset(dataset, tokenizer, objective, **options)
