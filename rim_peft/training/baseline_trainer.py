"""One readout per sample: answering at once, a written chain of thought, and pause tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from rim_peft.data.collator import TokenizedRow, chain_parts, refinement_readouts
from rim_peft.data.tokenization import tokenize_separator
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

    @property
    def trains_memory(self) -> bool:
        """Without blocks the memory rows are left as they are."""
        return self._rim_config.num_blocks > 0

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
            return partial(refinement_readouts, num_blocks=1)
        return partial(
            _written,
            separator_ids=tokenize_separator(self._tokenizer, self.args.step_separator, vocab_size=self.blocks.begin),
        )

    def row_limits(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """A written chain needs steps, and is one readout."""
        limits = super().row_limits(tokenizer)
        if not self.args.written_steps:
            return limits
        separator_ids = tokenize_separator(tokenizer, self.args.step_separator, vocab_size=self.blocks.begin)
        trunk = self.blocks.length
        count = partial(_count_written, separator_ids=separator_ids, trunk=trunk)
        return {**limits, "block_length": trunk + len(separator_ids), "count_tokens": count}


def _written(row: TokenizedRow, *, separator_ids: list[int]) -> list[list[int]]:
    return [[token for part in chain_parts(row, separator_ids=separator_ids) for token in part]]


def _count_written(row: TokenizedRow, *, separator_ids: list[int], trunk: int) -> int:
    (readout,) = _written(row, separator_ids=separator_ids)
    return len(row["prompt_ids"]) + trunk + len(readout)
