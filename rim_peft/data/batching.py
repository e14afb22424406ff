"""Which rows come when, and which make a batch: batches counted in tokens, and short chains before long ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
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
        dataset: tokenised rows.
        order: in which order they come.
        objective: what is trained of them, which says how long they are.
        max_tokens: tokens of a batch at most.
        num_processes: processes that share the batches out among them.
        options: what ``DataLoader`` takes besides, ``collate_fn`` among it.

    Raises:
        ValueError: the rows are a stream, or ``max_tokens`` does not fit them (:class:`TokenBatchSampler`).
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
    """Cut a sampler's order into batches of about equal numbers of tokens, none above ``max_tokens``.

    Every row comes once in each pass. All passes have the same number of batches, whatever their order, which is a
    multiple of the number of processes: so epochs, learning rates and the place to resume at are known beforehand.

    >>> list(TokenBatchSampler(range(6), lengths=[4, 3, 5, 4, 4, 4], max_tokens=17))
    [[0, 1, 2], [3, 4, 5]]

    Args:
        sampler: order of the rows; one that has epochs keeps them.
        lengths: tokens of each row.
        max_tokens: tokens of a batch at most, at least twice those of the longest row.
        num_processes: processes that share the batches out among them, one after the other.

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
                "Raise it, or leave out long rows with max_length and on_bad_rows='drop'."
            )
        self.sampler = sampler
        self._lengths = lengths
        # A batch holds the rows that begin within its equal share of all tokens, so it exceeds the share by less
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
            # At least one row here, and at least one for each batch to come.
            stop = start + 1
            while stop < len(order) - (self._num_batches - batch) and begins[stop] < batch * share:
                stop += 1
            if batch == self._num_batches:
                stop = len(order)
            yield order[start:stop]
            start = stop


def order_by_length(rows: Dataset, shares: Sequence[float], *, num_samples: int, seed: int) -> LengthCurriculum:
    """Return the order of a curriculum by length over tokenised rows; see :class:`LengthCurriculum`."""
    num_steps = [len(steps) for steps in rows["step_ids"]]
    return LengthCurriculum(num_steps, shares=shares, num_samples=num_samples, seed=seed)


class LengthCurriculum(Sampler[int]):
    """Short chains first: in phase ``k`` of a training, rows of at most ``k + 1`` steps; in the last phase all rows.

    Within a phase the rows come in random passes, each row once in a pass. What is drawn depends on the seed, on the
    place in the training and on where phases begin, so that a run that is resumed draws the same.

    >>> list(LengthCurriculum([3, 1, 2, 1], shares=[0.5, 0.25, 0.25], num_samples=16, seed=0))
    [3, 1, 1, 3]

    Args:
        num_steps: steps of each row.
        shares: share of the training that each phase takes.
        num_samples: samples of the whole training.
        seed: seed of the order.

    Raises:
        ValueError: a phase has no rows.
    """

    def __init__(self, num_steps: Sequence[int], *, shares: Sequence[float], num_samples: int, seed: int) -> None:
        self._num_rows = len(num_steps)
        self._seed = seed
        self._epoch = 0
        self._pass: tuple[int, int] | None = None
        self._order: list[int] = []
        self.begins: list[int] = []
        """The first sample of each phase, counted over the whole training."""
        self._phases: list[tuple[int | None, list[int]]] = []  # the most steps of its rows, and which they are
        begins = [0, *(round(end * num_samples) for end in accumulate(shares))]
        for phase, share in enumerate(shares):
            most = phase + 1 if phase + 1 < len(shares) else None
            rows = [row for row, steps in enumerate(num_steps) if most is None or steps <= most]
            if share > 0.0 and not rows:
                shortest = min(num_steps)
                raise ValueError(
                    f"length_shares: each phase must have rows to draw, got {list(shares)!r}, whose phase {phase + 1} "
                    f"has rows of at most {phase + 1} steps, and the shortest row has {shortest}. Begin with "
                    f"{shortest - 1} zeros."
                )
            if share > 0.0:
                self.begins.append(begins[phase])
                self._phases.append((most, rows))
        self.planned = tuple(self.begins)

    def __len__(self) -> int:
        return self._num_rows

    def set_epoch(self, epoch: int) -> None:
        """Go to a pass over as many samples as there are rows, from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self._num_rows
        return (self._draw(sample) for sample in range(first, first + self._num_rows))

    def most_steps(self, sample: int) -> int | None:
        """Return the most steps that a row has at a sample of the training; None in the last phase."""
        return self._phases[self._phase_at(sample)][0]

    def advance(self, now: int, sample: int) -> None:
        """Let the phase after the one of ``now`` begin at ``sample`` already; later ones come earlier by as much.

        A next phase that begins before ``sample`` anyway is left as it is.
        """
        following = self._phase_at(now) + 1
        if following < len(self.begins) and (gain := self.begins[following] - sample) > 0:
            self.begins[following:] = [begin - gain for begin in self.begins[following:]]

    def _phase_at(self, sample: int) -> int:
        return max(index for index, begin in enumerate(self.begins) if begin <= sample)

    def _draw(self, sample: int) -> int:
        phase = self._phase_at(sample)
        rows = self._phases[phase][1]
        number, place = divmod(sample - self.begins[phase], len(rows))
        if self._pass != (phase, number):
            self._pass, self._order = (phase, number), rows.copy()
            random.Random(f"{self._seed} {phase} {number}").shuffle(self._order)
        return self._order[place]
