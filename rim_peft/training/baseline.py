"""Baselines with one readout per sample: direct answers, a written chain, pause tokens, parallel step supervision."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Templates
from rim_peft.data.objective import Objective, TokenizedRow, chain_parts, list_lengths, step_lengths
from rim_peft.data.tokenization import tokenize_separator
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.config import RiMConfig
from rim_peft.values import Range, check_ranges

logger = logging.getLogger(__name__)


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
    steps_in_place: bool = field(
        default=False,
        metadata={"help": "Let the memory tokens of block t predict the first tokens of step r_t, all at once."},
    )
    step_weight: float = field(
        default=1.0, metadata={"help": "Weight of those tokens' loss; the answer's is 1. For the method parallel."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_range is not None:
            raise ValueError(f"block_range: must be null, got {self.block_range!r}: there is only one readout.")
        if not self.step_separator:
            raise ValueError(f"step_separator: must not be empty, got {self.step_separator!r}.")
        check_ranges(self, {"step_weight": Range(0, 1_000_000)})
        if self.steps_in_place and self.written_steps:
            raise ValueError("steps_in_place: must be False with written_steps, got True. Choose one.")


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


@dataclass(frozen=True)
class StepsInPlace(FinalAnswer):
    """The answer after the last block, and step ``r_t`` in the memory tokens of block ``t``, as far as it fits.

    A row has one block per step, and at least ``num_blocks``. Memory token ``j`` predicts token ``j`` of the step; what
    a step has beyond ``M`` tokens is cut, and memory tokens beyond its end predict nothing.

    >>> from rim_peft.sequence import BlockTokens
    >>> row = {"prompt_ids": [1], "step_ids": [[5, 6, 7], [8]], "answer_ids": [4]}
    >>> objective = StepsInPlace(BlockTokens(90, 91, 92, 2), num_blocks=3)
    >>> objective.readouts(row), objective.in_place(row)
    ([[], [], [4]], [[5, 6], [8]])

    Attributes:
        step_weight: ``lambda_step``.

    Source: arXiv 2606.31779.
    """

    step_weight: float = 1.0

    needs_steps: ClassVar[bool] = True

    @property
    def in_place_weight(self) -> float:
        """Loss weight of the steps."""
        return self.step_weight

    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return the answer, after the last block alone."""
        num_before = max(self.num_blocks, len(row["step_ids"])) - 1
        return [*([] for _ in range(num_before)), row["answer_ids"]]

    def in_place(self, row: TokenizedRow) -> list[list[int]]:
        """Return the first tokens of each step."""
        return [step[: self.blocks.block_size] for step in row["step_ids"]]

    def most_tokens(self, rows: pa.Table) -> NDArray[np.int64]:
        """Return an upper bound on each row's tokens."""
        num_blocks = np.maximum(list_lengths(rows["step_ids"]), self.num_blocks)
        return list_lengths(rows["prompt_ids"]) + num_blocks * self.blocks.length + list_lengths(rows["answer_ids"])


class BaselineTrainer(ReadoutTrainer):
    """Trains ``- log p(y | x, m_<=K)``: one readout, after all the adapter's blocks.

    With ``num_blocks=0`` this is plain LoRA fine-tuning, on the answer or, with ``written_steps``, on steps and answer;
    the memory rows do not change. With blocks, the memory tokens are pause tokens: part of the prompt, and supervised
    only through the answer after the last block. With ``steps_in_place`` they predict the steps too:
    ``- log p(y | x, m_<=K) - lambda_step · sum_t sum_j log p(r_t,j | x, m_<t, <b>, <m> × j)``, ``j`` up to ``M``.

    Rows have the same format as for the other stages. See :class:`ReadoutTrainer` for the arguments.

    Source: pause tokens: Goyal et al., arXiv 2310.02226. Steps in place: arXiv 2606.31779.
    """

    config_class = BaselineConfig
    least_blocks = 0
    args: BaselineConfig

    def prepare_rows(self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> Dataset | IterableDataset:
        """Tokenise rows; says how many steps are longer than a block.

        Raises:
            ValueError: as in :class:`ReadoutTrainer`.
        """
        prepared = super().prepare_rows(rows, tokenizer, name)
        if self.args.steps_in_place and isinstance(prepared, Dataset):
            lengths = list_lengths(pc.list_flatten(prepared.with_format("arrow")["step_ids"]))
            size = self._rim_config.block_size
            if num_longer := int((lengths > size).sum()):
                logger.warning(
                    "%d of %d steps in the %s dataset have more than %d tokens (EOS included) and are cut there: "
                    "adapter.block_size.",
                    *(num_longer, len(lengths), name, size),
                )
        return prepared

    @classmethod
    def objective_of(cls, args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return the objective; all blocks of the adapter count as one unless steps are in them.

        Raises:
            ValueError: steps are to be in blocks, and there are none.
        """
        if args.steps_in_place:
            if config.num_blocks < 1:
                raise ValueError("num_blocks: must be at least 1 with steps_in_place, got 0. Give the adapter blocks.")
            return StepsInPlace(config.block_tokens, config.num_blocks, args.step_weight)
        blocks = replace(config.block_tokens, per_readout=config.num_blocks)
        if not args.written_steps:
            return FinalAnswer(blocks, 1)
        return WrittenChain(blocks, 1, separator_of(args, config, tokenizer))


def separator_of(args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return the tokens of ``step_separator``; none without a tokenizer, when nobody needs lengths."""
    if tokenizer is None:
        return ()
    return tuple(tokenize_separator(tokenizer, args.step_separator, vocab_size=config.block_tokens.begin))
