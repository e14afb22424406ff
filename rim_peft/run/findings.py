"""What a check finds out about a run: figures, errors, notes, and what could not be checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from rim_peft.recipe.checks import option_names
from rim_peft.run.at_hand import NotAtHandError
from rim_peft.run.costs import BatchSize, PeakMemory
from rim_peft.run.rows import ShownRow

T = TypeVar("T")


@dataclass
class StageFindings:
    """Findings about a stage; None for anything unknown.

    Attributes:
        stage: its section.
        num_rows: rows that it trains on.
        num_bad_rows: rows that it cannot train on.
        mean_tokens: mean tokens of a row as laid out, readouts included.
        longest_tokens: tokens of the longest row.
        tokens_per_epoch: tokens of all rows.
        num_steps: optimiser steps on one device.
        batch: the largest batch.
        stated_tokens: tokens per row of that batch, if its rows are artificial.
        precision: type of mixed precision, such as ``"bfloat16"``; None for none.
        optimizer: its name.
        memory: peak memory of a step on that batch.
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
    """Findings about a run.

    Attributes:
        base: folder or Hub id of the base; None if it is built from scratch.
        device: ``"cuda"`` or ``"cpu"``, for which memory is estimated.
        is_of_another: whether another machine will train it, so that missing packages here are not errors.
        architecture: the base's class.
        attention: its attention implementation.
        num_trainable: trained numbers.
        num_frozen: the base's numbers, each counted once even in quantised weights.
        stages: findings about each stage.
        first_rows: the first rows as the first stage trains them.
        errors: problems that would stop the run.
        not_checked: what could not be checked, why, and what to do.
        notes: problems that do not stop it.
    """

    base: str | None
    device: str
    is_of_another: bool = False
    architecture: str | None = None
    attention: str | None = None
    num_trainable: int | None = None
    num_frozen: int | None = None
    stages: list[StageFindings] = field(default_factory=list)
    first_rows: list[ShownRow] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, look: Callable[[], T], *, section: str = "") -> T | None:
        """Return the result of a check, or None after recording its failure as an error or as not checked.

        Args:
            what: name of the check, for messages.
            look: the check; may raise anything.
            section: section of the recipe whose keys the errors are about.
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
        """Peak bytes of the stage that takes the most; None if no stage's peak is known."""
        return max((stage.memory.total for stage in self.stages if stage.memory is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-compatible values; memory in bytes, with ``total``."""
        values = {name: value for name, value in asdict(self).items() if name != "is_of_another"}
        for stage, entry in zip(self.stages, values["stages"], strict=True):
            if stage.memory is not None:
                entry["memory"]["total"] = stage.memory.total
        return {**values, "peak": self.peak}


def _with_section(section: str, message: str) -> str:
    """Return an error; if it begins with a key of the section, with the key's full name."""
    is_key = section != "" and message.partition(":")[0] in option_names(section)
    return f"{section}.{message}" if is_key else message
