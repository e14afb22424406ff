"""Order and batching of rows: batches sized in tokens, and short chains before long ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from rim_peft.data.objective import Objective


def load_by_tokens(
    dataset: Any,
    order: Sampler[int],
    objective: Objective,
    *,
    max_tokens: int,
    num_processes: int,
    **options: Any,
) -> DataLoader:
    """Return a loader of batches of at most ``max_tokens`` tokens.

    Args:
        objective: the training objective, which determines the length of each row.
        max_tokens: largest number of tokens in a batch.
        num_processes: processes that share the batches.
        options: further arguments of ``DataLoader``, such as ``collate_fn``.

    Raises:
        ValueError: the rows are a stream, or ``max_tokens`` is too small for them (:class:`TokenBatchSampler`).
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "max_tokens_per_batch: needs the rows' lengths, which a stream does not have. Give a Dataset, or use "
            "per_device_train_batch_size."
        )
    lengths = [objective.num_tokens(row) for row in dataset]
    batches = TokenBatchSampler(order, lengths=lengths, max_tokens=max_tokens, num_processes=num_processes)
    return DataLoader(dataset, batch_sampler=batches, **options)


class TokenBatchSampler(Sampler[list[int]]):
    """Split a sampler's order into batches of about equal numbers of tokens, none above ``max_tokens``.

    Each pass yields every row once. The number of batches is a multiple of the number of processes and does not depend
    on the order, so epochs, learning rates and the resume position are known in advance.

    >>> list(TokenBatchSampler(range(6), lengths=[4, 3, 5, 4, 4, 4], max_tokens=17))
    [[0, 1, 2], [3, 4, 5]]

    Args:
        sampler: order of the rows; may have epochs.
        lengths: number of tokens of each row.
        max_tokens: largest number of tokens in a batch; at least twice the longest row.
        num_processes: processes that take batches in turn.

    Raises:
        ValueError: ``max_tokens`` is too small for the rows, or there are too few rows for the processes.
    """

    batch_size = None
    drop_last = False

    def __init__(
        self, sampler: Sampler[int], *, lengths: Sequence[int], max_tokens: int, num_processes: int = 1
    ) -> None:
        longest = max(lengths)
        if max_tokens < 2 * longest:
            raise ValueError(
                f"max_tokens_per_batch: must be at least twice the longest row's {longest} tokens, got {max_tokens}. "
                "Raise it, or drop long rows with max_length and on_bad_rows='drop'."
            )
        self.sampler = sampler
        self._lengths = lengths
        # A batch holds the rows that start within its equal share of all tokens, so it exceeds the share by less
        # than one row.
        least = math.ceil(sum(lengths) / (max_tokens - longest))
        self._num_batches = math.ceil(least / num_processes) * num_processes
        if self._num_batches > len(lengths):
            raise ValueError(
                f"train_dataset: must have at least a row for each of {self._num_batches} batches on {num_processes} "
                f"processes, got {len(lengths)}. Use fewer processes."
            )

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        begins = [0, *accumulate(self._lengths[row] for row in order)]
        share = begins[-1] / self._num_batches
        start = 0
        for batch in range(1, self._num_batches + 1):
            # At least one row in this batch, and at least one left for each later batch.
            stop = start + 1
            while stop < len(order) - (self._num_batches - batch) and begins[stop] < batch * share:
                stop += 1
            if batch == self._num_batches:
                stop = len(order)
            yield order[start:stop]
            start = stop


@dataclass(frozen=True)
class Pace:
    """How samples map to optimiser steps, as the Trainer counts them.

    Attributes:
        num_rows: samples per epoch.
        samples_in_step: samples per step, over micro-batches and processes; an epoch's last step may have fewer.
        steps_in_epoch: steps per epoch.
        num_steps: steps of the whole training.
    """

    num_rows: int
    samples_in_step: int
    steps_in_epoch: int
    num_steps: int

    @classmethod
    def of(cls, args: Any, num_rows: int, *, num_processes: int) -> Pace:
        """Return the pace that the Trainer's options give."""
        size = args.per_device_train_batch_size
        if args.dataloader_drop_last:
            num_batches = num_rows // size // num_processes
        else:
            num_batches = math.ceil(math.ceil(num_rows / size) / num_processes)
        accumulated = args.gradient_accumulation_steps
        in_epoch = max(1, math.ceil(num_batches / accumulated))
        num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * in_epoch)
        return cls(num_rows, size * accumulated * num_processes, in_epoch, num_steps)

    def step_of(self, sample: int) -> int:
        """Return the step that trains a sample; samples are counted over all epochs."""
        epoch, place = divmod(sample, self.num_rows)
        return epoch * self.steps_in_epoch + min(place // self.samples_in_step, self.steps_in_epoch - 1)

    def first_sample(self, step: int) -> int:
        """Return the first sample that a step trains."""
        epoch, place = divmod(step, self.steps_in_epoch)
        return epoch * self.num_rows + place * self.samples_in_step


def order_by_length(rows: Dataset, shares: Sequence[float], pace: Pace, *, seed: int = 0) -> LengthCurriculum:
    """Return a :class:`LengthCurriculum` over tokenised rows."""
    return LengthCurriculum([len(steps) for steps in rows["step_ids"]], shares=shares, pace=pace, seed=seed)


class LengthCurriculum(Sampler[int]):
    """Short chains first: phase ``k`` draws rows of at most ``k + 1`` steps, the last phase draws all rows.

    Within a phase the rows come in random passes, each row once per pass. The draw depends only on the seed, the
    position in the training and the starts of the phases, so a resumed run draws the same rows.

    >>> list(LengthCurriculum([3, 1, 2, 1], shares=[0.5, 0.25, 0.25], pace=Pace(4, 2, 2, 8), seed=0))
    [1, 3, 3, 1]

    Args:
        num_steps: number of reasoning steps of each row.
        shares: each phase's share of the training.
        pace: how samples map to optimiser steps.

    Raises:
        ValueError: a phase has no rows.
    """

    def __init__(self, num_steps: Sequence[int], *, shares: Sequence[float], pace: Pace, seed: int) -> None:
        self._pace = pace
        self._seed = seed
        self._epoch = 0
        self._pass: tuple[int, int] | None = None
        self._order: list[int] = []
        self.begins: list[int] = []
        """The first optimiser step of each phase."""
        self._phases: list[tuple[int | None, list[int]]] = []  # (most steps of a row, indices of the rows)
        begins = [0, *(round(end * pace.num_steps) for end in accumulate(shares))]
        for phase, share in enumerate(shares):
            most = phase + 1 if phase + 1 < len(shares) else None
            rows = [row for row, steps in enumerate(num_steps) if most is None or steps <= most]
            if share > 0.0 and not rows:
                shortest = min(num_steps)
                raise ValueError(
                    f"length_shares: each phase must have rows to draw, got {list(shares)!r}, whose phase {phase + 1} "
                    f"has rows of at most {phase + 1} steps, but the shortest row has {shortest}. Begin with "
                    f"{shortest - 1} zeros."
                )
            if share > 0.0:
                self.begins.append(begins[phase])
                self._phases.append((most, rows))
        self.planned = tuple(self.begins)

    def __len__(self) -> int:
        return self._pace.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * len(self)
        return (self._draw(sample) for sample in range(first, first + len(self)))

    def phase_at(self, step: int) -> int:
        """Return the phase of an optimiser step."""
        return max(index for index, begin in enumerate(self.begins) if begin <= step)

    def most_steps(self, step: int) -> int | None:
        """Return the limit on a row's reasoning steps at an optimiser step; None in the last phase."""
        return self._phases[self.phase_at(step)][0]

    def advance(self, now: int, step: int) -> None:
        """Start the phase after that of step ``now`` at ``step``, and move later phases forward by the same amount.

        No change if that phase starts by ``step`` anyway.
        """
        following = self.phase_at(now) + 1
        if following < len(self.begins) and (gain := self.begins[following] - step) > 0:
            self.begins[following:] = [begin - gain for begin in self.begins[following:]]

    def _draw(self, sample: int) -> int:
        phase = self.phase_at(self._pace.step_of(sample))
        rows = self._phases[phase][1]
        number, place = divmod(sample - self._pace.first_sample(self.begins[phase]), len(rows))
        if self._pass != (phase, number):
            self._pass, self._order = (phase, number), rows.copy()
            random.Random(f"{self._seed} {phase} {number}").shuffle(self._order)
        return self._order[place]
