"""What a check of a run found, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from rim_peft.recipe.keys import option_names
from rim_peft.run.at_hand import NotAtHandError
from rim_peft.run.memory import BatchSize, PeakMemory

T = TypeVar("T")


@dataclass
class StageFindings:
    """What is known of a stage; None where it could not be found out.

    Attributes:
        stage: its section.
        num_rows: rows that it trains on.
        num_bad_rows: rows that it cannot train on.
        mean_tokens: of a row as it is laid out, readouts included.
        longest_tokens: the same of the longest row.
        tokens_per_epoch: of all rows.
        num_steps: optimiser steps on one device.
        batch: the largest batch.
        stated_tokens: tokens of the rows in it, where they are not real ones.
        precision: type of mixed precision, such as ``"bfloat16"``; None for none.
        optimizer: its name.
        memory: at the peak of a step on that batch.
    """

    stage: str
    num_rows: int | None = None
    num_bad_rows: int | None = None
    mean_tokens: float | None = None
    longest_tokens: int | None = None
    tokens_per_epoch: int | None = None
    num_steps: int | None = None
    batch: BatchSize | None = None
    stated_tokens: int | None = None
    precision: str | None = None
    optimizer: str = ""
    memory: PeakMemory | None = None


@dataclass
class RunFindings:
    """What is known of a run.

    Attributes:
        base: folder or Hub id of the base; None if it is built from scratch.
        device: ``"cuda"`` or ``"cpu"``, for which memory is estimated.
        is_of_another: whether another machine is to train it, so that what is missing on this one stops nothing.
        architecture: the base's class.
        attention: its attention implementation.
        num_trainable: trained numbers.
        num_frozen: the base's numbers, each counted as one in quantised weights too.
        stages: of each stage.
        errors: what would stop the run.
        not_checked: what could not be looked at, why, and what to do.
        notes: what does not stop it, but should be known.
    """

    base: str | None
    device: str
    is_of_another: bool = False
    architecture: str | None = None
    attention: str | None = None
    num_trainable: int | None = None
    num_frozen: int | None = None
    stages: list[StageFindings] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, look: Callable[[], T], *, section: str = "") -> T | None:
        """Return what a look gives. Its errors are findings, and what is not at hand was not checked; then None.

        Args:
            what: what is not checked where the look fails.
            look: may raise anything.
            section: of the recipe, whose keys errors are about.
        """
        try:
            return look()
        except NotAtHandError as error:
            self.not_checked.append(f"{what}: {error}")
        except ImportError as error:
            if self.is_of_another:
                self.not_checked.append(f"{what}: a package is missing here: {error}")
            else:
                self.errors.append(_with_section(section, str(error)))
        except (ValueError, OSError) as error:
            self.errors.append(_with_section(section, str(error)))
        except Exception as error:  # a base's own code can raise anything
            self.errors.append(f"{what}: {type(error).__name__}: {error}")
        return None

    @property
    def peak(self) -> int | None:
        """Bytes at the peak of the stage that takes most; None if no stage's are known."""
        return max((stage.memory.total for stage in self.stages if stage.memory is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it; memory in bytes, with ``total``."""
        values = {name: value for name, value in asdict(self).items() if name != "is_of_another"}
        for stage, entry in zip(self.stages, values["stages"], strict=True):
            if stage.memory is not None:
                entry["memory"]["total"] = stage.memory.total
        return {**values, "peak": self.peak}


def _with_section(section: str, message: str) -> str:
    """Return an error with the full name of the key that it begins with, if that is one of the section's."""
    is_key = section != "" and message.partition(":")[0] in option_names(section)
    return f"{section}.{message}" if is_key else message
