"""Several processes of one training: what one of them does first, and what all of them learn of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


class MainProcessFailed(RuntimeError):  # noqa: N818 - of another process, which says what its error is
    """The main process has failed in what it does before the others, which stop too."""


def num_processes() -> int:
    """Return how many processes train together; known without setting anything up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process is the one that writes and reports; known without setting anything up."""
    return int(os.environ.get("RANK", "0")) == 0


def check_resumed(checkpoint: Path) -> None:
    """Check that as many processes go on as have written a checkpoint, or the steps to come would be others.

    Raises:
        ValueError: there are more or fewer.
    """
    written = len(list(checkpoint.glob("rng_state_*.pth"))) or 1  # one process writes rng_state.pth
    if written != num_processes():
        raise ValueError(
            f"resume: must go on with as many processes as have written {checkpoint}, {written}, got "
            f"{num_processes()}, whose batches together have another size. Start {written}."
        )


def shards_weights() -> bool:
    """Tell whether the launcher asks for FSDP, which gives each process a part of the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def on_main(function: Callable[[], T]) -> T:
    """Let the main process alone call a function, and return its result, which must be picklable, in every process.

    Raises:
        MainProcessFailed: the function failed; in the main process the error is the function's own.
    """
    if num_processes() == 1:
        return function()
    _connect()
    outcome: list[T | None] = [None]
    failure: Exception | None = None
    if is_main():
        try:
            outcome = [function()]
        except Exception as error:
            failure = error
    # Two messages, since a result may be none that a failed one could be told from.
    (has_failed,) = broadcast_object_list([failure is not None])
    if failure is not None:
        raise failure
    if has_failed:
        raise MainProcessFailed("the main process has failed, and says why. Look at its error.")
    broadcast_object_list(outcome)
    result: T = outcome[0]  # type: ignore[assignment]
    return result


def main_first(function: Callable[[], T]) -> T:
    """Call a function in the main process, then in the others, which find on the disk what it has left there.

    Raises:
        MainProcessFailed: the function failed in the main process, where the error is the function's own.
    """
    kept: list[T] = []
    on_main(lambda: kept.append(function()))
    return kept[0] if kept else function()


def _connect() -> None:
    """Let the processes find each other, and each of them its GPU.

    Raises:
        RuntimeError: each of them would train alone.
    """
    if PartialState().num_processes != num_processes():
        raise RuntimeError(
            f"processes: {num_processes()} were started, but accelerate finds no GPUs that they could share the work "
            "on. Start one process, or set ACCELERATE_USE_CPU=true for processes on the CPU."
        )
