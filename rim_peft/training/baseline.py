"""Baselines with one readout per sample: direct answers, a written chain of thought, and pause tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Templates
from rim_peft.data.objective import Objective, TokenizedRow, chain_parts, list_lengths, step_lengths
from rim_peft.data.tokenization import tokenize_separator
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.config import RiMConfig


@dataclass
class BaselineConfig(ReadoutConfig):
    """Options of :class:`BaselineTrainer`."""

    written_steps: bool = field(
        default=False,
        metadata={"help": "Write out the steps before the answer, each followed by step_separator (chain of thought)."},
    )
    step_separator: str = field(
        default=Templates.separator, metadata={"help": "Text after each step if steps are written out."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_range is not None:
            raise ValueError(f"block_range: must be null, got {self.block_range!r}: there is only one readout.")
        if not self.step_separator:
            raise ValueError(f"step_separator: must not be empty, got {self.step_separator!r}.")


@dataclass(frozen=True)
class FinalAnswer(Objective):
    """The answer alone, after all blocks (treated as one) or after none."""

    @property
    def trains_memory(self) -> bool:
        """Whether there are blocks; without them the memory rows do not change."""
        return self.blocks.per_readout > 0

    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return the answer."""
        return [row["answer_ids"]]


@dataclass(frozen=True)
class WrittenChain(FinalAnswer):
    """Steps and answer as one text.

    Attributes:
        separator_ids: tokens after each step.
    """

    separator_ids: tuple[int, ...] = ()

    needs_steps: ClassVar[bool] = True

    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return the chain."""
        return [[token for part in chain_parts(row, separator_ids=self.separator_ids) for token in part]]

    def describe_length(self, row: TokenizedRow) -> tuple[str, str]:
        """Return texts that say how many tokens a row takes and which position it reaches."""
        text = f"it takes {self.num_tokens(row)} tokens"
        return text, text

    def most_tokens(self, rows: pa.Table) -> NDArray[np.int64]:
        """Return an upper bound on each row's tokens: each step ends with the separator instead of EOS."""
        separators = list_lengths(rows["step_ids"]) * len(self.separator_ids)
        return super().most_tokens(rows) + step_lengths(rows) + separators


class BaselineTrainer(ReadoutTrainer):
    """Trains ``- log p(y | x, m_<=K)``: one readout, after all the adapter's blocks.

    With ``num_blocks=0`` this is plain LoRA fine-tuning, on the answer or, with ``written_steps``, on steps and answer;
    the memory rows do not change. With blocks, the memory tokens are pause tokens: part of the prompt, and supervised
    only through the answer after the last block.

    Rows have the same format as for the other stages. See :class:`ReadoutTrainer` for the arguments.

    Source: pause tokens: Goyal et al., arXiv 2310.02226.
    """

    config_class = BaselineConfig
    least_blocks = 0
    args: BaselineConfig

    @classmethod
    def objective_of(cls, args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return the objective; all blocks of the adapter count as one, since they share one readout."""
        blocks = replace(config.block_tokens, per_readout=config.num_blocks)
        if not args.written_steps:
            return FinalAnswer(blocks, 1)
        return WrittenChain(blocks, 1, separator_of(args, config, tokenizer))


def separator_of(args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return the tokens of ``step_separator``; none without a tokenizer, when nobody needs lengths."""
    if tokenizer is None:
        return ()
    return tuple(tokenize_separator(tokenizer, args.step_separator, vocab_size=config.block_tokens.begin))
