"""What an export is asked to be, and the folder that it is written to at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rim_peft.data.examples import Question, Templates
from rim_peft.export.tokens import APPEND_TO
from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.files import check_folder_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STAGING = ".partial"
"""Folder within an export's that holds it until it is complete; if it is still there, the export is unfinished."""

_MOVED = ".names"


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        num_blocks: blocks after a prompt; the adapter's own number if None.
        dtype: type of the weights: ``"auto"`` for the base's own, or one of ``DTYPES``.
        max_shard_size: size at which weights continue in another file, such as ``"5GB"``.
        append_to: what the tokenizer appends blocks to, one of ``APPEND_TO``.
        keep_tied: keep a tied head tied.
        max_differing: how many of the checked prompts may be answered with other tokens.
        spare_ids: ids for memory tokens on an unmodified base; looked for if None.

    Raises:
        ValueError: an option is out of range.
    """

    num_blocks: int | None = None
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    append_to: str = "auto"
    keep_tied: bool = False
    max_differing: int = 0
    spare_ids: tuple[int, ...] | None = None

    def blocks_of(self, config: RiMConfig) -> int:
        """Return how many blocks an export of an adapter has after a prompt.

        Raises:
            ValueError: a number is asked for, but the adapter has no blocks.
        """
        if not config.num_blocks and self.num_blocks is not None:
            raise ValueError(
                f"num_blocks: must be left out for an adapter without blocks, got {self.num_blocks} (--num-blocks)."
            )
        return config.num_blocks if self.num_blocks is None else self.num_blocks

    def dtype_of(self, base: torch.dtype) -> torch.dtype:
        """Return the type of an export's weights, given the type of its base."""
        return base if self.dtype == "auto" else DTYPES[self.dtype]

    def __post_init__(self) -> None:
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ValueError(f"num_blocks: must be at least 1, got {self.num_blocks!r}. Omit it for the adapter's.")
        for name, value, known in (
            ("dtype", self.dtype, ("auto", *DTYPES)),
            ("append_to", self.append_to, APPEND_TO),
        ):
            if value not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got {value!r}.")


@dataclass(frozen=True)
class Prompts:
    """Questions for checking an export, and how to ask them.

    Attributes:
        questions: texts or chats.
        templates: prompt templates.
        max_new_tokens: maximum tokens of an answer, EOS included.
    """

    questions: Sequence[Question]
    templates: Templates
    max_new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return how prompts are made, for a record."""
        variables = dict(self.templates.chat_template_kwargs)
        return {"prompt_template": self.templates.prompt, "chat_template_kwargs": variables}


def check_new(folder: Path) -> None:
    """Check that a folder is new, empty, or holds only the remains of a killed export.

    Raises:
        ValueError: it does not.
    """
    check_folder_path("out", folder)
    left = {STAGING, *moved_from(folder)}
    if folder.exists() and any(path.name not in left for path in folder.iterdir()):
        raise ValueError(f"out: must be a new or empty folder, {folder} is not. Give another one.")


def moved_from(folder: Path) -> list[str]:
    """Return the files being moved from the staging folder to the export's own when the export was killed."""
    names = folder / STAGING / _MOVED
    listed = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    return [Path(name).name for name in listed]


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed merged export left."""
    for name in moved_from(folder):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / STAGING, ignore_errors=True)


@contextmanager
def written_at_once(folder: Path, *, last: str) -> Iterator[Path]:
    """Yield a folder to write an export to; its files move into ``folder`` at the end.

    A kill leaves the staging folder, which marks the export as unfinished: nothing answers from it, and the next export
    replaces it.

    Args:
        folder: where the export goes, checked by :func:`check_new`.
        last: the file that says what the export is; it moves last.
    """
    staging = folder / STAGING
    clear_unfinished(folder)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        clear_unfinished(folder)
        raise
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: name == last)
    (staging / _MOVED).write_text("\n".join(names), encoding="utf-8")
    for name in names:
        (staging / name).replace(folder / name)
    shutil.rmtree(staging)
