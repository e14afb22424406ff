"""What decides which chains are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rim_peft.tasks.steps import check_cut, check_reading
from rim_peft.values import Range, check_ranges

Keep = Literal["shortest", "all"]
KEEPS = get_args(Keep)


@dataclass(frozen=True)
class ChainOptions:
    """How chains are sampled, read and chosen.

    Attributes:
        num_chains: chains for each question.
        hinted_tries: further tries for a question without a right chain, with the answer shown to the teacher.
        keep: which right chains of a question are kept: the ``shortest``, or ``all`` that differ.
        split_steps: how a chain becomes steps, as in the task ``rows``.
        answer_from: where a chain has its answer, as in the task ``rows``.
        temperature: sampling temperature; 0 takes the most likely token.
        top_p: share of probability that is sampled from.
        max_new_tokens: longest chain in tokens; a longer one is cut and rejected.
        seed: seed of the run; each question and try has a seed of its own, derived from it.
        batch_size: questions at a time, for a server requests at the same time.
        replace_steps: write chains for rows that have steps too, instead of keeping those.

    Raises:
        ValueError: a value is out of range.
    """

    num_chains: int = 4
    hinted_tries: int = 0
    keep: Keep = "shortest"
    split_steps: str = "lines"
    answer_from: str = "after:####"
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 0
    batch_size: int = 8
    replace_steps: bool = False

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "num_chains": Range(1, 10_000),
                "hinted_tries": Range(0, 10_000),
                "temperature": Range(0, 100),
                "top_p": Range(0, 1, above=True),
                "max_new_tokens": Range(1, 1 << 20),
                "batch_size": Range(1, 1 << 16),
                "seed": Range(0, (1 << 32) - 1),
            },
        )
        if self.keep not in KEEPS:
            raise ValueError(f"keep: must be one of {', '.join(KEEPS)}, got {self.keep!r}.")
        check_cut(self.split_steps)
        check_reading(self.answer_from)
        if self.temperature == 0 and (self.num_chains > 1 or self.hinted_tries > 1):
            raise ValueError(
                "temperature: must be above 0 if there is more than one try, since all would be the same, got 0 with "
                f"num_chains {self.num_chains} and hinted_tries {self.hinted_tries}. Raise it, or give one try."
            )
