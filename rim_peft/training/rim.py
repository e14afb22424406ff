"""The two stages of RiM: explicit grounding and implicit refinement. Source: arXiv 2605.30343."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from rim_peft.data.objective import Objective, TokenizedRow, list_lengths, step_lengths
from rim_peft.training.losses import SCHEDULES, grounding_weights, refinement_weights
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.config import RiMConfig
from rim_peft.values import check_share, shown

READOUT_STEPS = {"next": 1, "own": 0}
"""By how many steps a block's readout is ahead of the block."""


@dataclass
class GroundingConfig(ReadoutConfig):
    """Options of :class:`GroundingTrainer`."""

    schedule: str = field(
        default="relative",
        metadata={
            "help": "How the weight of block t's readout changes over the stage: 'relative' falls from 1 to 0, early "
            "blocks first; 'linear' stays t/T; 'uniform' stays 1.",
            "choices": list(SCHEDULES),
        },
    )
    hold: float = field(
        default=0.0,
        metadata={"help": "Share of the stage, in [0, 1), during which 'relative' stays at 1 before it falls."},
    )
    readout_step: str = field(
        default="next",
        metadata={
            "help": "The step that block t reads out: 'next', r_{t+1}, so that the answer follows block T (as in the "
            "paper); 'own', r_t, so that the answer follows block T + 1.",
            "choices": list(READOUT_STEPS),
        },
    )
    trailing_blocks: bool = field(
        default=True,
        metadata={
            "help": "Give every sample at least the adapter's num_blocks blocks, and let each block from T on read "
            "out the answer. Without it (as in the paper) a sample has one block per step."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        if self.readout_step not in READOUT_STEPS:
            raise ValueError(
                f"readout_step: must be one of {', '.join(READOUT_STEPS)}, got {shown(self.readout_step)}."
            )
        check_share("hold", self.hold)
        if self.block_range is not None and not self.trailing_blocks:
            raise ValueError(
                f"block_range: must be null without trailing_blocks, got {self.block_range!r}: a sample then has one "
                "block per step."
            )
        if self.hold and self.schedule != "relative":
            raise ValueError(
                f"hold: must be 0 with schedule={self.schedule!r}, since only 'relative' falls, got {self.hold}. "
                "Omit it, or use 'relative'."
            )


@dataclass(frozen=True)
class Grounding(Objective):
    """Next step ``r_{t+1}`` after block ``t``, the answer after block ``T`` and trailing blocks; ``lambda_t(s)``.

    A row has one block per step, and at least ``num_blocks``.

    >>> from rim_peft.sequence import BlockTokens
    >>> row = {"prompt_ids": [1], "step_ids": [[2], [3]], "answer_ids": [4]}
    >>> Grounding(BlockTokens(90, 91, 92, 2), num_blocks=0).readouts(row)
    [[3], [4]]
    >>> Grounding(BlockTokens(90, 91, 92, 2), num_blocks=4).readouts(row)
    [[3], [4], [4], [4]]

    Attributes:
        schedule: how ``lambda_t(s)`` changes, one of ``SCHEDULES``.
        hold: share of the stage during which it stays at 1.
        steps_ahead: 1 to read out the next step after block ``t``; 0 for step ``t`` itself, so that a row has one
            block more and the answer follows block ``T + 1``.
    """

    schedule: str = "relative"
    hold: float = 0.0
    steps_ahead: int = 1

    needs_steps: ClassVar[bool] = True

    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return the steps from the second (or first) on, then the answer, repeated for trailing blocks."""
        readouts = [*row["step_ids"][self.steps_ahead :], row["answer_ids"]]
        trailing = (self.num_blocks if num_blocks is None else num_blocks) - len(readouts)
        return readouts + [row["answer_ids"]] * trailing

    def weights(
        self, num_steps: Tensor, num_blocks: Tensor, *, progress: float | None, longest: int | None = None
    ) -> Tensor:
        """Return ``lambda_t(s)``; 0 for blocks beyond the longest chain that a curriculum has reached."""
        more = 1 - self.steps_ahead
        used = num_blocks if longest is None else torch.minimum(num_blocks, num_steps.clamp(min=longest) + more)
        weights = grounding_weights(
            num_steps + more, used, progress=progress or 0.0, schedule=self.schedule, hold=self.hold
        )
        return functional.pad(weights, (0, int(num_blocks.max()) - weights.shape[1]))

    def last_block(self, longest: int) -> int:
        """Return the block that reads out the answer of chains of ``longest`` steps."""
        return longest + 1 - self.steps_ahead

    def most_tokens(self, rows: pa.Table) -> NDArray[np.int64]:
        """Return an upper bound on each row's tokens; no step is read out twice."""
        num_blocks = np.maximum(list_lengths(rows["step_ids"]) + 1 - self.steps_ahead, self.num_blocks)
        longest = num_blocks * (self.blocks.length + list_lengths(rows["answer_ids"]))
        return list_lengths(rows["prompt_ids"]) + step_lengths(rows) + longest


class GroundingTrainer(ReadoutTrainer):
    """Trains ``L1 = - sum_t lambda_t(s) · log p(r_{t+1} | x, m_<=t)``, where ``r_{T+1}`` is the answer.

    Rows must have steps. See :class:`ReadoutTrainer` for the arguments.
    """

    config_class = GroundingConfig
    args: GroundingConfig

    @classmethod
    def objective_of(cls, args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return the objective; with trailing blocks a row has at least the adapter's blocks."""
        num_blocks = args.most_blocks(config) if args.trailing_blocks else 0
        return Grounding(config.block_tokens, num_blocks, args.schedule, args.hold, READOUT_STEPS[args.readout_step])


@dataclass
class RefinementConfig(ReadoutConfig):
    """Options of :class:`RefinementTrainer`.

    The number of blocks is the adapter's own, ``RiMConfig.num_blocks``, unless ``block_range`` is given.
    """

    reset_optimizer: bool = field(
        default=True,
        metadata={
            "help": "Start from a new optimiser, as the paper does. false: continue with the moments of stage 1's "
            "optimiser; the learning rate and its schedule are still this stage's own."
        },
    )


@dataclass(frozen=True)
class Refinement(Objective):
    """The answer after each of ``num_blocks`` blocks, weighted by ``alpha_k``."""

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
        """Return the objective."""
        return Refinement(config.block_tokens, args.most_blocks(config))
