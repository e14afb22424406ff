"""What an export can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rim_peft.data.examples import Question, Templates
from rim_peft.export.tokens import APPEND_TO
from rim_peft.export.weights import DTYPES
from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.files import check_folder_path


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        num_blocks: blocks after a prompt; the adapter's own if None.
        dtype: of the weights: ``"auto"`` for the base's own, or one of ``DTYPES``.
        max_shard_size: size at which weights go on in another file, such as ``"5GB"``.
        append_to: what the tokenizer appends blocks to, one of ``APPEND_TO``.
        keep_tied: leave a tied head tied.
        max_differing: how many of the checked prompts may be answered with other tokens.

    Raises:
        ValueError: an option is out of its range.
    """

    num_blocks: int | None = None
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    append_to: str = "auto"
    keep_tied: bool = False
    max_differing: int = 0

    def blocks_of(self, config: RiMConfig) -> int:
        """Return how many blocks an export of an adapter has behind a prompt."""
        return config.num_blocks if self.num_blocks is None else self.num_blocks

    def dtype_of(self, base: torch.dtype) -> torch.dtype:
        """Return the type of an export's weights, whose base has the type ``base``."""
        return base if self.dtype == "auto" else DTYPES[self.dtype]

    def __post_init__(self) -> None:
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ValueError(
                f"num_blocks: must be at least 1, got {self.num_blocks!r}. Leave it out for the adapter's."
            )
        for name, value, known in (
            ("dtype", self.dtype, ("auto", *DTYPES)),
            ("append_to", self.append_to, APPEND_TO),
        ):
            if value not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got {value!r}.")


@dataclass(frozen=True)
class Prompts:
    """Questions that an export is checked on, and how they are asked.

    Attributes:
        questions: texts or chats.
        templates: how prompts are written.
        max_new_tokens: tokens of an answer at most, EOS included.
    """

    questions: Sequence[Question]
    templates: Templates
    max_new_tokens: int


def check_new(folder: Path) -> None:
    """Check that a folder is new or empty.

    Raises:
        ValueError: it is not.
    """
    check_folder_path("out", folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: must be a new or empty folder, {folder} is not. Give another one.")
