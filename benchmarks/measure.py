"""Measure time and memory: ways in turn, medians with quartiles, ratios by round, exact peaks.

Nothing here judges. A shared machine gets slower and faster while a benchmark runs; ways that take turns run under the
same conditions, so their ratio within a round is more reliable than the ratio of their medians.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Way = Callable[[], Any]
"""One of the ways to compare; its return value is dropped."""

MIN_ROUNDS = 3
"""Rounds measured even if they take longer than the time of a case."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples, in the samples' unit."""

    median: float
    lower: float
    upper: float


def interleave(
    ways: dict[str, Way], *, rounds: int, warm_up: int = 1, device: str = "cpu", most_seconds: float | None = None
) -> dict[str, list[float]]:
    """Time ways in turn, each once per round; every round starts with another way.

    Args:
        ways: what to time, by name.
        rounds: rounds to measure.
        warm_up: untimed rounds before them.
        device: with a CUDA device, the clock is read after the device has finished its work.
        most_seconds: start no further round after this time, once ``MIN_ROUNDS`` are measured.

    Returns:
        Seconds of each round by way; sample ``i`` of every way belongs to round ``i``.
    """
    names = list(ways)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_up):
        for name in names:
            ways[name]()
    started = time.perf_counter()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_seconds(ways[name], device))
        if most_seconds is not None and number + 1 >= MIN_ROUNDS and time.perf_counter() - started > most_seconds:
            break
    return samples


def repeated(way: Way, times: int) -> Way:
    """Return a way that runs ``times`` times, for ways too short for the clock."""

    def repeat() -> None:
        for _ in range(times):
            way()

    return repeat


def spread(samples: Sequence[float]) -> Spread:
    """Return median and quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, lower=2.0, upper=4.0)
    """
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    lower, median, upper = quantiles(samples, n=4, method="inclusive")
    return Spread(median, lower, upper)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return median and quartiles of the ratios within each round.

    >>> ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0])  # the second round was ten times slower for both
    Spread(median=2.0, lower=2.0, upper=2.5)
    """
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def peak_memory(run: Way, *, device: str = "cpu") -> int:
    """Return the most bytes that ``run`` held at once, in addition to those held before.

    On the CPU, all allocations and releases of tensor memory are added up, so the figure is exact and reproducible; on
    CUDA it is the allocator's own maximum. Run ``run`` once first to exclude memory allocated once and kept, such as
    the optimiser's state.
    """
    gc.collect()
    if not device.startswith("cuda"):
        return _cpu_peak(run)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors' memory, counting shared memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _seconds(way: Way, device: str) -> float:
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    way()
    if is_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _cpu_peak(run: Way) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak
