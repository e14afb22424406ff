"""The folder that a run writes to, before it does: can it be written to, and has it room."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rim_peft.recipe import RecipeError
from rim_peft.run.memory import PeakMemory
from rim_peft.tuner.files import check_folder_path

PROBE = ".rim-peft-"
"""Prefix of a folder that is made to see whether one can be; a kill may leave it."""


def check_writable(folder: Path) -> None:
    """Check that a folder is there, or could be made, and that files can be written to it.

    Raises:
        RecipeError: they cannot.
    """
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no file's name can
        reason = error.strerror if isinstance(error, OSError) else "no name of a file has such characters"
        raise RecipeError(f"output_dir: cannot be {str(folder)[:200]!r} ({reason}). Give another folder.") from None
    try:
        check_folder_path("output_dir", folder)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    place = _nearest(folder)
    try:
        # What permissions, mounts and quotas allow is known when it is tried.
        with tempfile.TemporaryDirectory(dir=place, prefix=PROBE):
            pass
    except OSError as error:
        raise RecipeError(
            f"output_dir: must be a folder that can be written to, {place} cannot ({error.strerror}). "
            "Give another folder."
        ) from None


def lacking_space(folder: Path, stages: Sequence[tuple[Any, PeakMemory | None, int | None]]) -> str | None:
    """Return a sentence if the checkpoints of a run will not fit on the disk; None if they will, as far as is known.

    Args:
        folder: output folder of the run.
        stages: options, memory and number of steps of each stage.
    """
    needed = sum(_checkpoints(args, num_steps) * _size(memory) for args, memory, num_steps in stages if memory)
    free = shutil.disk_usage(_nearest(folder)).free
    if needed <= free:
        return None
    return (
        f"output_dir: the checkpoints take about {_gib(needed)}, {_gib(free)} are free in {_nearest(folder)}. "
        "save_total_limit keeps the last ones alone, save_steps makes fewer."
    )


def _checkpoints(args: Any, num_steps: int | None) -> int:
    """Count the checkpoints that a stage leaves; 1 where it is not known."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    count = 1
    if strategy == "steps" and num_steps is not None:
        every = args.save_steps if args.save_steps >= 1 else args.save_steps * num_steps
        count = math.ceil(num_steps / max(1, every))
    elif strategy == "epoch" and args.max_steps <= 0:
        count = math.ceil(args.num_train_epochs)
    return min(count, args.save_total_limit or count)


def _size(memory: PeakMemory) -> int:
    """Return the bytes of a checkpoint: the adapter and what the optimiser keeps of it."""
    return memory.adapter + (memory.optimizer or 0)


def _nearest(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))  # False for no name of a file


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
