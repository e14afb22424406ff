"""Options of the one stage of methods that RiM is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from rim_peft.data.examples import Templates
from rim_peft.training.readout_config import ReadoutConfig


@dataclass
class BaselineConfig(ReadoutConfig):
    """Options of :class:`~rim_peft.training.baseline_trainer.BaselineTrainer`."""

    written_steps: bool = field(
        default=False,
        metadata={"help": "Write the steps out before the answer, step_separator behind each (a chain of thought)."},
    )
    step_separator: str = field(
        default=Templates.separator, metadata={"help": "Text behind each step where steps are written out."}
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: ``block_range`` is given, or the separator is empty.
        """
        super().__post_init__()
        if self.block_range is not None:
            raise ValueError(f"block_range: must be null, got {self.block_range!r}: there is one readout, not several.")
        if not self.step_separator:
            raise ValueError(f"step_separator: must not be empty, got {self.step_separator!r}.")
