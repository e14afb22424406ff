"""Options of stage 1, explicit grounding."""

from __future__ import annotations

from dataclasses import dataclass, field

from rim_peft.training.readout_config import ReadoutConfig, check_share
from rim_peft.training.schedules import SCHEDULES


@dataclass
class GroundingConfig(ReadoutConfig):
    """Options of :class:`~rim_peft.training.grounding_trainer.GroundingTrainer`."""

    schedule: str = field(
        default="relative",
        metadata={
            "help": "How the weight of block t's readout runs over the stage: 'relative' falls from 1 to 0, early "
            "blocks first; 'linear' stays t/T; 'uniform' stays 1.",
            "choices": list(SCHEDULES),
        },
    )
    hold: float = field(
        default=0.0,
        metadata={"help": "Share of the stage, in [0, 1), during which 'relative' stays at 1 before it falls."},
    )
    trailing_blocks: bool = field(
        default=True,
        metadata={
            "help": "Give every sample at least the adapter's num_blocks blocks, and let each block from T on read "
            "out the answer. Without it (the paper's way) a sample has one block per step."
        },
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an unknown schedule, or ``hold`` out of range.
        """
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        check_share("hold", self.hold)
        if self.block_range is not None and not self.trailing_blocks:
            raise ValueError(
                f"block_range: must be null without trailing_blocks, got {self.block_range!r}: a sample has one block "
                "for each of its steps then."
            )
        if self.hold and self.schedule != "relative":
            raise ValueError(f"hold: only 'relative' falls, so hold must be 0 with schedule={self.schedule!r}.")
