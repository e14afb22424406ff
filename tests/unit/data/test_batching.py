"""Batches by tokens: what they hold, and that every pass has as many of them. Short chains first."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from rim_peft.data.batching import LengthCurriculum, Pace, TokenBatchSampler


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


def _drawn(sampler: LengthCurriculum, num_samples: int) -> list[int]:
    drawn: list[int] = []
    for epoch in range(-(-num_samples // len(sampler))):
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    return drawn[:num_samples]


def _curriculum(num_steps: list[int], shares: list[float], *, num_samples: int, seed: int = 3) -> LengthCurriculum:
    """One sample a step, so that steps and samples are the same."""
    pace = Pace(len(num_steps), 1, len(num_steps), num_samples)
    return LengthCurriculum(num_steps, shares=shares, pace=pace, seed=seed)


def test_a_curriculum_draws_short_chains_first_and_each_row_once_in_a_pass() -> None:
    num_steps = [1 + row % 4 for row in range(40)]
    sampler = _curriculum(num_steps, [0.25, 0.25, 0.5], num_samples=200)
    assert len(sampler) == len(num_steps)
    drawn = _drawn(sampler, 240)  # the last pass over the rows may go beyond the training's end
    lengths = [num_steps[row] for row in drawn]
    assert set(lengths[:50]) == {1}
    assert set(lengths[50:100]) == {1, 2}
    assert set(lengths[100:]) == {1, 2, 3, 4}
    for begin, rows in ((0, 10), (50, 20), (100, 40)):
        for first in range(begin, begin + 2 * rows, rows):
            assert len(set(drawn[first : first + rows])) == rows
    assert drawn[:10] != drawn[10:20]  # each pass has an order of its own
    assert drawn == _drawn(_curriculum(num_steps, [0.25, 0.25, 0.5], num_samples=200), 240)
    assert drawn != _drawn(_curriculum(num_steps, [0.25, 0.25, 0.5], num_samples=200, seed=4), 240)


def test_phases_without_rows_are_named_and_can_be_left_out() -> None:
    with pytest.raises(ValueError, match=r"length_shares: .* the shortest row has 3. Begin with 2 zeros"):
        _curriculum([3, 4], [0.5, 0.5], num_samples=10)
    sampler = _curriculum([3, 4], [0.0, 0.0, 0.5, 0.5], num_samples=8)
    assert _drawn(sampler, 4) == [0] * 4
    assert set(_drawn(sampler, 8)) == {0, 1}


def test_a_phase_that_is_learned_ends_early_and_the_last_one_gains() -> None:
    num_steps = [1 + row % 3 for row in range(30)]
    sampler = _curriculum(num_steps, [0.25, 0.25, 0.5], num_samples=200)
    assert sampler.begins == [0, 50, 100]
    sampler.advance(19, 30)
    assert sampler.begins == [0, 30, 80]
    sampler.advance(20, 40)  # it has begun already when that is asked for again
    assert sampler.begins == [0, 30, 80]
    sampler.advance(79, 85)  # the next one begins sooner by itself
    sampler.advance(150, 160)  # there is none behind the last
    assert sampler.begins == [0, 30, 80]
    assert [sampler.most_steps(step) for step in (0, 29, 30, 79, 80, 199)] == [1, 1, 2, 2, None, None]
    lengths = [num_steps[row] for row in _drawn(sampler, 200)]
    assert set(lengths[:30]) == {1}
    assert set(lengths[30:80]) == {1, 2}
    assert set(lengths[80:]) == {1, 2, 3}
    again = _curriculum(num_steps, [0.25, 0.25, 0.5], num_samples=200)
    again.begins = [0, 30, 80]
    assert _drawn(again, 200) == _drawn(sampler, 200)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "batch", "accumulated", "processes"), [(5, 4, 1, 1), (18, 2, 8, 1), (11, 4, 1, 1), (30, 4, 3, 2)]
)
def test_every_phase_comes_in_its_steps_however_epochs_end(
    num_rows: int, batch: int, accumulated: int, processes: int, drop_last: bool
) -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        dataloader_drop_last=drop_last,
        max_steps=20,
    )
    pace = Pace.of(args, num_rows, num_processes=processes)
    num_steps = [1 + row % 3 for row in range(num_rows)]
    sampler = LengthCurriculum(num_steps, shares=[0.4, 0.3, 0.3], pace=pace, seed=0)
    assert sampler.begins == [0, 8, 14]
    seen: dict[int, set[int]] = {}
    for epoch in range(-(-20 // pace.steps_in_epoch)):
        sampler.set_epoch(epoch)
        for place, row in enumerate(sampler):
            step = epoch * pace.steps_in_epoch + min(place // pace.samples_in_step, pace.steps_in_epoch - 1)
            seen.setdefault(step, set()).add(num_steps[row])
    assert all(max(seen[step]) <= (1, 2, 3)[sampler.phase_at(step)] for step in range(20))
    for phase, begin in enumerate(sampler.begins):
        steps = range(begin, [*sampler.begins, 20][phase + 1])
        assert max(max(seen[step]) for step in steps) == phase + 1
