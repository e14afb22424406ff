"""The registry of benchmarks, and the settings that they get.

A benchmark is a generator of rows in one of the modules of ``MODULES``::

    @benchmark("one_pass", "all readouts in one pass against one sequence for each")
    def run(settings: Settings) -> Iterator[Row]:
        for prompt in settings.choose(quick=(16,), cpu=(64, 128), cuda=(128, 512)):
            settings.tell(f"n={prompt}")
            ...
            samples = settings.time({"one pass": ..., "separate": ...})
            yield Row(...)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TypeVar

from benchmarks.measure import Way, interleave
from benchmarks.options import ServingOptions
from benchmarks.report import Row

MODULES = (
    "one_pass",
    "packing",
    "head",
    "overhead",
    "embedding",
    "answering",
    "readouts",
    "train_step",
    "memory",
    "qlora",
    "recipes",
    "estimate",
    "scaling",
    "processes",
    "kernels",
    "laptop",
    "startup",
    "engines",
    "serving",
)
"""Modules of this package with benchmarks, in running order."""

T = TypeVar("T")


class BenchmarkError(Exception):
    """What keeps a benchmark from running, such as a server that has ended: printed without a traceback."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        device: ``"cpu"``, with sizes for two cores, or ``"cuda"``, with real sizes.
        quick: use the smallest sizes and two rounds: shows whether everything runs, not how fast.
        serving: options of the benchmark of that name.
    """

    device: str = "cpu"
    quick: bool = False
    serving: ServingOptions = field(default_factory=ServingOptions)

    @property
    def rounds(self) -> int:
        """Maximum rounds of a case."""
        return self.choose(quick=2, cpu=7, cuda=20)

    def choose(self, *, quick: T, cpu: T, cuda: T) -> T:
        """Return the value for this run's size."""
        if self.quick:
            return quick
        return cuda if self.device == "cuda" else cpu

    def time(self, ways: dict[str, Way]) -> dict[str, list[float]]:
        """Time ways in turn; see :func:`benchmarks.measure.interleave`."""
        return interleave(
            ways,
            rounds=self.rounds,
            warm_up=self.choose(quick=0, cpu=1, cuda=3),
            device=self.device,
            most_seconds=self.choose(quick=1.0, cpu=6.0, cuda=15.0),
        )

    def tell(self, text: str) -> None:
        """Print to stderr what comes next."""
        print(f"    {text}", file=sys.stderr, flush=True)


Run = Callable[[Settings], Iterator[Row]]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its name on the command line, a one-line summary, and the function that yields its rows."""

    name: str
    summary: str
    run: Run


_REGISTERED: dict[str, Benchmark] = {}


def benchmark(name: str, summary: str) -> Callable[[Run], Run]:
    """Register the decorated function as a benchmark."""

    def register(run: Run) -> Run:
        _REGISTERED[name] = Benchmark(name, summary, run)
        return run

    return register


def all_benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name, in the order of ``MODULES`` regardless of the import order."""
    for module in MODULES:
        import_module(f"benchmarks.{module}")
    places = {f"benchmarks.{module}": place for place, module in enumerate(MODULES)}
    ordered = sorted(_REGISTERED.values(), key=lambda entry: places.get(entry.run.__module__, len(places)))
    return {entry.name: entry for entry in ordered}
