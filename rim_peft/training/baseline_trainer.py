"""One readout per sample: answering at once, a written chain of thought, and pause tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.collator import TokenizedRow, written_readout
from rim_peft.sequence import BlockTokens
from rim_peft.training.baseline_config import BaselineConfig
from rim_peft.training.readout_trainer import ReadoutTrainer


class BaselineTrainer(ReadoutTrainer):
    """Trains ``- log p(y | x, m_<=K)``: one readout, after all blocks that the adapter has.

    With ``num_blocks=0`` that is plain fine-tuning by LoRA, on the answer or, with ``written_steps``, on steps and
    answer; the memory rows are then left as they are. With blocks they are pause tokens: they come with the prompt,
    and nothing but the answer behind the last one tells them what to hold.

    Rows are those of the other stages. See :class:`ReadoutTrainer` for the arguments.

    Source: pause tokens: Goyal et al., arXiv 2310.02226.
    """

    config_class = BaselineConfig
    least_blocks = 0
    args: BaselineConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._rim_config.num_blocks == 0:
            self.model.base_model.memory.rows(self.model.active_adapter).requires_grad_(False)

    @property
    def needs_steps(self) -> bool:
        """Steps are needed where they are written out."""
        return self.args.written_steps

    @property
    def blocks(self) -> BlockTokens:
        """All blocks of the adapter as one, since they have one readout."""
        return replace(super().blocks, per_readout=self._rim_config.num_blocks)

    @property
    def min_blocks(self) -> int:
        """One readout."""
        return 1

    def readouts(self) -> Callable[..., list[list[int]]]:
        """The answer, or steps and answer as one text."""
        if not self.args.written_steps:
            return _read_answer
        return _WrittenReadouts(separator_ids(self._tokenizer, self.args.step_separator))

    def block_weights(self, num_steps: Tensor, num_blocks: Tensor, *, progress: float) -> Tensor:
        """Return 1 for every sample."""
        return torch.ones(len(num_blocks), 1, device=num_blocks.device)

    def _separator_length(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        return len(separator_ids(tokenizer, self.args.step_separator)) if self.args.written_steps else None


class _WrittenReadouts:
    """One readout, steps and answer; not a closure, since data loader processes get it by pickle."""

    def __init__(self, separator: list[int]) -> None:
        self.separator = separator

    def __call__(self, row: TokenizedRow) -> list[list[int]]:
        return [written_readout(row, self.separator)]


def _read_answer(row: TokenizedRow) -> list[list[int]]:
    return [row["answer_ids"]]


def separator_ids(tokenizer: PreTrainedTokenizerBase, separator: str) -> list[int]:
    """Return the token ids of what stands behind a written step.

    Raises:
        ValueError: the tokenizer has no tokens for it.
    """
    ids: list[int] = tokenizer(separator, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"step_separator: must give tokens, got {separator!r}, which gives none with this tokenizer. Choose a text "
            "that it knows."
        )
    return ids
