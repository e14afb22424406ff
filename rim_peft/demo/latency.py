"""How long an answer takes: to its first token, and as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Latency:
    """Medians over questions asked one at a time.

    Attributes:
        first_token_ms: milliseconds from the prompt's ids to the answer's first token. For a chain of thought that is
            the token that names the answer, after all thoughts.
        answer_ms: milliseconds to the whole answer, EOS included.
        num_tokens: tokens written.
    """

    first_token_ms: float
    answer_ms: float
    num_tokens: float


class _Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time; the first call brings the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


@torch.no_grad()
def measure_latency(
    ways: dict[str, tuple[Callable[..., Any], list[torch.Tensor], int]], *, answer_tokens: int = 2, warm_up: int = 3
) -> dict[str, Latency]:
    """Ask the same questions in several ways, in turn, so that other work on the machine slows all of them alike.

    Args:
        ways: by name, a ``generate`` function, the prompts (1, S), and the most tokens an answer can take.
        answer_tokens: tokens at the end of what is written that are the answer: its word and EOS.
        warm_up: questions asked before the clock counts.
    """
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
    questions = min(len(prompts) for _, prompts, _ in ways.values())
    for index in range(questions):
        for name, (generate, prompts, most) in ways.items():
            clock, started = _Clock(), time.perf_counter()
            generate(input_ids=prompts[index], max_new_tokens=most, do_sample=False, streamer=clock)
            ticks = clock.times[1:]
            if index >= warm_up:
                first = ticks[max(0, len(ticks) - answer_tokens)]
                taken[name].append((first - started, ticks[-1] - started, len(ticks)))
    return {
        name: Latency(
            first_token_ms=1000 * median(first for first, _, _ in rows),
            answer_ms=1000 * median(whole for _, whole, _ in rows),
            num_tokens=median(count for _, _, count in rows),
        )
        for name, rows in taken.items()
    }
