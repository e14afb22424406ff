"""Stage 2, implicit refinement: every block's readout is the answer. Source: arXiv 2605.30343."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.collator import TokenizedRow
from rim_peft.data.objective import Objective
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.training.schedules import refinement_weights
from rim_peft.tuner.config import RiMConfig


@dataclass
class RefinementConfig(ReadoutConfig):
    """Options of :class:`RefinementTrainer`.

    The number of blocks is the adapter's own, ``RiMConfig.num_blocks``, unless ``block_range`` is given.
    """

    reset_optimizer: bool = field(
        default=True,
        metadata={
            "help": "Start from a new optimiser, as the paper does. false: go on with the moments that stage 1's "
            "optimiser ended with; the learning rate and its schedule are this stage's own all the same."
        },
    )


@dataclass(frozen=True)
class Refinement(Objective):
    """The answer after each of ``num_blocks`` blocks, weighed by ``alpha_k``."""

    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return the answer, once for each block."""
        return [row["answer_ids"]] * (self.num_blocks if num_blocks is None else num_blocks)

    def weights(
        self, num_steps: Tensor, num_blocks: Tensor, *, progress: float | None, longest: int | None = None
    ) -> Tensor:
        """Return ``alpha_k``, the same for every sample of a batch."""
        weights = refinement_weights(int(num_blocks.max())).to(num_blocks.device)
        return weights.expand(len(num_blocks), -1)


class RefinementTrainer(ReadoutTrainer):
    """Trains ``L2 = - sum_k alpha_k · log p(y | x, m_<=k)``, ``alpha_k = 2k / (K (K + 1))``.

    Steps are not needed. See :class:`ReadoutTrainer` for the arguments.
    """

    config_class = RefinementConfig
    args: RefinementConfig

    @classmethod
    def objective_of(cls, args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return what the stage trains of a row."""
        return Refinement(config.block_tokens, args.most_blocks(config))
