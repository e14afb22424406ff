"""Options of Coconut, a method that RiM is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rim_peft.training.readout_config import ReadoutConfig, are_shares, check_share
from rim_peft.training.schedules import phase_at
from rim_peft.values import Range, check_ranges

_REFUSED: dict[str, Any] = {
    "block_range": None,
    "pack_length": None,
    "max_tokens_per_batch": None,
    "pad_to_multiple_of": None,
    "compile_layers": False,
    "gradient_checkpointing": False,
}


@dataclass
class CoconutConfig(ReadoutConfig):
    """Options of :class:`~rim_peft.training.coconut_trainer.CoconutTrainer`.

    Stage ``k`` writes the chain without its first ``k`` steps, behind ``k · thoughts_per_step`` thoughts; the last
    stage, ``num_stages``, the answer alone. ``step_template`` and ``answer_template`` write the chain's parts.
    """

    num_stages: int = field(
        default=3,
        metadata={
            "help": "Stages after stage 0, which is a plain chain of thought: stage k has thoughts for the first k "
            "steps, the last stage for all of them."
        },
    )
    thoughts_per_step: int = field(
        default=1, metadata={"help": "Continuous thoughts that replace a step; the paper has 2 for GSM8K."}
    )
    stage_shares: list[float] | None = field(
        default=None,
        metadata={"help": "Share of the training that each stage takes, stage 0 first, in sum 1; equal if not set."},
    )
    mix_share: float = field(
        default=0.0,
        metadata={"help": "Share of the steps, in [0, 1), that train a stage drawn from all of them, not the current."},
    )
    reset_optimizer: bool = field(
        default=True, metadata={"help": "Forget the optimiser's state where a stage begins, as the paper does."}
    )
    step_separator: str = field(default="\n", metadata={"help": "Text behind each step of a written chain."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Must stay off: a thought needs the cache of the passes before."}
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: one is out of range, or cannot be had with thoughts.
        """
        super().__post_init__()
        for name, needed in _REFUSED.items():
            if (value := getattr(self, name)) != needed:
                raise ValueError(
                    f"{name}: must stay {needed!r} for Coconut, got {value!r}: its thoughts take one pass after the "
                    "other on a cache. Remove it."
                )
        for name in ("num_stages", "thoughts_per_step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be an integer of at least 1, got {value!r}.")
        check_ranges(self, dict.fromkeys(("num_stages", "thoughts_per_step"), Range(1, 1000)))
        check_share("mix_share", self.mix_share)
        shares = self.stage_shares
        if shares is not None and not (are_shares(shares) and len(shares) == self.num_stages + 1):
            raise ValueError(
                f"stage_shares: must be num_stages + 1 = {self.num_stages + 1} shares that sum to 1, the last one not "
                f"0, got {shares!r}."
            )

    @property
    def num_thoughts(self) -> int:
        """Thoughts of the last stage, with which a trained model answers."""
        return self.num_stages * self.thoughts_per_step

    def stage_at(self, progress: float) -> int:
        """Return the stage at a share of the training, in [0, 1]."""
        return phase_at(progress, self.stage_shares or [1 / (self.num_stages + 1)] * (self.num_stages + 1))
