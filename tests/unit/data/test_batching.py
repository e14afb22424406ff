"""Batches by tokens: what they hold, and that every pass has as many of them."""

from __future__ import annotations

import random

import pytest

from rim_peft.data.batching import TokenBatchSampler


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [200, 333, 2000, 10**6])
def test_every_row_once_none_too_large_and_always_as_many(num_processes: int, max_tokens: int) -> None:
    generator = random.Random(0)
    lengths = [generator.choice([5, 20, 100]) for _ in range(150)]
    order = list(range(150))
    counts = set()
    for _ in range(20):
        generator.shuffle(order)
        sampler = TokenBatchSampler(order, lengths=lengths, max_tokens=max_tokens, num_processes=num_processes)
        batches = list(sampler)
        assert [row for batch in batches for row in batch] == order
        assert all(batch and sum(lengths[row] for row in batch) <= max_tokens for batch in batches)
        assert len(batches) == len(sampler)
        counts.add(len(batches))
    (count,) = counts
    assert count % num_processes == 0


def test_few_long_rows_get_a_batch_each_if_need_be() -> None:
    assert list(TokenBatchSampler([0, 1], lengths=[60, 40], max_tokens=120)) == [[0], [1]]
    assert list(TokenBatchSampler([1, 0], lengths=[60, 40], max_tokens=120)) == [[1], [0]]
    assert list(TokenBatchSampler([0], lengths=[60], max_tokens=120)) == [[0]]


def test_budgets_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="must be at least twice the longest row's 60 tokens, got 100"):
        TokenBatchSampler([0, 1], lengths=[60, 40], max_tokens=100)
    with pytest.raises(ValueError, match="a row for each of 4 batches on 4 processes, got 2"):
        TokenBatchSampler([0, 1], lengths=[60, 40], max_tokens=1000, num_processes=4)
