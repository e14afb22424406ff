"""A run's output folder: whether a run may use it, which files belong to its adapter, and how these are written."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from rim_peft.export.folder import STAGING
from rim_peft.recipe import Recipe, RecipeError
from rim_peft.recipe.reading import differing_keys, read_mapping, resolve
from rim_peft.run.costs import PeakMemory
from rim_peft.run_folders import FAILURE_FILE
from rim_peft.training.files import HOLDER, LOCK, check_free
from rim_peft.tuner.card import CARD_FILE
from rim_peft.tuner.files import RECORD_FILE, check_files, check_folder_path
from rim_peft.values import some_of

logger = logging.getLogger(__name__)

BASE_FOLDER = "base"
RECIPE_FILE = "recipe.yaml"
ADAPTER_FILE = CONFIG_NAME

PROBE = ".rim-peft-"
"""Prefix of the folder that :func:`check_writable` creates as a test; a kill may leave it."""


def check_writable(folder: Path) -> None:
    """Check that a folder exists or can be created, and that files can be written to it.

    Raises:
        RecipeError: they cannot.
    """
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long or has invalid characters
        reason = error.strerror if isinstance(error, OSError) else "file names cannot have these characters"
        raise RecipeError(f"output_dir: cannot be {str(folder)[:200]!r} ({reason}). Give another folder.") from None
    try:
        check_folder_path("output_dir", folder)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    place = _nearest(folder)
    try:
        # Only an attempt shows what permissions, mounts and quotas allow.
        with tempfile.TemporaryDirectory(dir=place, prefix=PROBE):
            pass
    except OSError as error:
        raise RecipeError(
            f"output_dir: must be a folder that can be written to, but {place} cannot ({error.strerror}). Give another "
            "folder."
        ) from None


def lacking_space(folder: Path, stages: Sequence[tuple[Any, PeakMemory | None, int | None]]) -> str | None:
    """Return a sentence if the checkpoints of a run will not fit on the disk, None if they will as far as is known.

    Args:
        stages: options, memory and number of steps of each stage.
    """
    needed = sum(_checkpoints(args, num_steps) * _size(memory) for args, memory, num_steps in stages if memory)
    free = shutil.disk_usage(_nearest(folder)).free
    if needed <= free:
        return None
    return (
        f"output_dir: the checkpoints take about {_gib(needed)}, {_gib(free)} are free in {_nearest(folder)}. "
        "Set save_total_limit to keep only the last ones, or a larger save_steps."
    )


def _checkpoints(args: Any, num_steps: int | None) -> int:
    """Count the checkpoints that a stage leaves; 1 if unknown."""
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
    """Return the bytes of a checkpoint: the adapter and the optimiser's state."""
    return memory.adapter + (memory.optimizer or 0)


def _nearest(folder: Path) -> Path:
    """Return the folder itself, or the nearest parent that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))  # False for an invalid name


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def write_files(folder: Path, save: Callable[[Path], None], *, last: str) -> None:
    """Let ``save`` write files to a temporary folder, and move them into ``folder`` when all are complete.

    The file ``last`` is moved last: if it exists, so do the others.
    """
    for left_behind in folder.glob(".partial-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        save(Path(partial))
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)


_SUFFIXES = (".json", ".yaml", ".md", ".safetensors", ".jinja", ".model")
"""Suffixes of an adapter's files, its documents, its base and most tokenizers; no pickles."""

_TOKENIZER_FILES = ("merges.txt", "vocab.txt")

_LEFT_OUT = ("best.safetensors", "trainer_state.json")
"""Files that only a resumed training reads."""


def check_adapter(folder: Path) -> None:
    """Check that a folder holds an adapter with intact files.

    Raises:
        FileNotFoundError: there is none, or its training has not finished.
        ValueError: its files are damaged.
    """
    if not (folder / ADAPTER_FILE).exists():
        remedy = "Give the folder of an adapter."
        if (folder / RECIPE_FILE).exists():
            remedy = (
                f"Its training has not finished. If it is yours: rim-peft train {folder / RECIPE_FILE} "
                f"output_dir={folder} resume=true."
            )
        if (folder / STAGING).exists():
            remedy = "Its export has not finished: run the same rim-peft export again."
        raise FileNotFoundError(f"{folder}: must hold an adapter ({ADAPTER_FILE}), but does not. {remedy}")
    check_files(folder)


def shared_files(folder: Path, *, papers_only: bool = False) -> dict[str, Path]:
    """Return the files of an adapter's folder that others need, by their path in it.

    These are adapter, tokenizer, card, recipe and record, and the base if it is in the folder; not checkpoints.

    Args:
        folder: output folder of a run, or an adapter's folder.
        papers_only: omit the adapter's own two files.

    Raises:
        ValueError: one of them is a link out of the folder. Through such links a stranger's folder could have any
            file of this machine copied or uploaded.
    """
    left_out = (*_LEFT_OUT, *((ADAPTER_FILE, SAFETENSORS_WEIGHTS_NAME) if papers_only else ()))
    paths = sorted([*folder.glob("*"), *folder.glob(f"{BASE_FOLDER}/*")])
    shared = {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.is_file()
        and (path.suffix in _SUFFIXES or path.name in _TOKENIZER_FILES)
        and path.name not in left_out
        and not path.name.startswith(".")
    }
    for name, path in shared.items():
        if not _is_own(folder, path):
            raise ValueError(
                f"{folder}: its files must be in it, but {name} is a link to {path.resolve()}. Copy that file here if "
                "it belongs to the adapter, or remove the link."
            )
    return shared


def _is_own(folder: Path, path: Path) -> bool:
    """Tell whether a file is in a folder, or in the blobs that the Hub's cache links its folders to."""
    inside, target = folder.resolve(), path.resolve()
    in_cache = inside.parent.name == "snapshots" and target.is_relative_to(inside.parent.parent / "blobs")
    return target.is_relative_to(inside) or in_cache


def listed_files(folder: Path) -> list[str]:
    """Return the names of the files that a run's record lists: those that answers depend on and nobody should edit.

    ``adapter_config.json`` and ``recipe.yaml`` name folders, which may be moved. Their settings that answers depend on
    are noted with the weights and in the record instead.
    """
    return [name for name in shared_files(folder) if name not in (ADAPTER_FILE, RECIPE_FILE, RECORD_FILE, CARD_FILE)]


def holds_run(folder: Path) -> bool:
    """Tell whether a folder holds anything besides the files of a run that was stopped before it began training."""
    entries = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    entries = {name for name in entries if not name.startswith(PROBE)}
    unbegun = {LOCK, HOLDER, FAILURE_FILE, *(f".{name}.partial" for name in (RECIPE_FILE, HOLDER, FAILURE_FILE))}
    if RECIPE_FILE in entries:
        unbegun |= {RECIPE_FILE, BASE_FOLDER, f"{BASE_FOLDER}.partial"}
    return not entries <= unbegun


def check_folder(folder: Path, recipe: Recipe) -> bool:
    """Return whether the folder holds a run to resume; writes nothing.

    Raises:
        RecipeError: the folder cannot be written to, holds something other than this run, or ``resume`` is not set.
        InUseError: another process trains into it.
    """
    check_writable(folder)
    check_free(folder)
    if not holds_run(folder):
        return False
    if not recipe.resume:
        raise RecipeError(
            f"output_dir: must be new or empty, {folder} is not. Give another folder, or resume=true to resume the run "
            "in it."
        )
    started = folder / RECIPE_FILE
    if not started.exists():
        raise RecipeError(f"resume: {folder} holds no run to resume (no {RECIPE_FILE}). Give the folder of a run.")
    kept = read_started(started)
    if differing := differing_keys(kept, resolve(recipe)):
        raise RecipeError(
            f"resume: the run in {folder} was started with other values of {some_of(differing, 8)}. Give the same ones "
            f"({started} has them), or another output_dir."
        )
    if "allow_special_tokens" not in (kept.get("data") or {}) and not recipe.data.allow_special_tokens:
        logger.warning(
            "resume: the run in %s was started by a version that read special tokens spelt out in rows as special "
            "tokens. If yours contain any, give data.allow_special_tokens=true to end with the same weights.",
            folder,
        )
    return True


def read_started(path: Path) -> dict[str, Any]:
    """Return the recipe that a run was started with."""
    try:
        return read_mapping(path, example="output_dir: outputs/run")
    except RecipeError as error:
        raise RecipeError(
            f"{error}\n{path}: must say what the run was started with, but is damaged. Restore it from a copy, or "
            "give another output_dir."
        ) from None


def kept_base(folder: Path) -> str | None:
    """Return the name of the base in a folder's run; None if there is none."""
    path = folder / RECIPE_FILE
    model = read_started(path).get("model") if path.exists() else None
    name = model.get("name_or_path") if isinstance(model, dict) else None
    return name if isinstance(name, str) else None
