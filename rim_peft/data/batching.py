"""Which rows make a batch when its size is counted in tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from rim_peft.data.collator import ReadoutCollator


def load_by_tokens(
    dataset: Any, order: Sampler[int], collator: ReadoutCollator, *, max_tokens: int, num_processes: int, **options: Any
) -> DataLoader:
    """Return a loader of batches of at most ``max_tokens`` tokens.

    Args:
        dataset: tokenised rows.
        order: in which order they come.
        collator: lays them out.
        max_tokens: tokens of a batch at most.
        num_processes: processes that share the batches out among them.
        options: what ``DataLoader`` takes besides.

    Raises:
        ValueError: the rows are a stream, or ``max_tokens`` does not fit them (:class:`TokenBatchSampler`).
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "max_tokens_per_batch: needs the rows' lengths, which a stream does not have. Give a Dataset, or use "
            "per_device_train_batch_size."
        )
    lengths = [collator.count_tokens(row) for row in dataset]
    batches = TokenBatchSampler(order, lengths=lengths, max_tokens=max_tokens, num_processes=num_processes)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collator, **options)


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
