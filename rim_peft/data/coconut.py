"""Tokenised examples → one batch of prompts and written chains, as the stages of Coconut shorten them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rim_peft.data.collator import TokenizedRow, chain_parts
from rim_peft.sequence import IGNORE_INDEX


def count_longest(row: TokenizedRow, *, separator_ids: Sequence[int], thoughts_per_step: int, num_stages: int) -> int:
    """Count the tokens that a row takes at the stage where it takes most: prompt, ``<b>``, thoughts, ``</b>`` and text.

    >>> row = {"prompt_ids": [1], "step_ids": [[5, 6, 2], [7, 2]], "answer_ids": [8, 2]}
    >>> count_longest(row, separator_ids=[3], thoughts_per_step=1, num_stages=2)
    10
    """
    lengths = [len(part) for part in chain_parts(row, separator_ids=separator_ids)]
    texts = [sum(lengths[min(stage, len(lengths) - 1) :]) for stage in range(num_stages)] + [lengths[-1]]
    longest = max(thoughts_per_step * stage + text for stage, text in enumerate(texts))
    return len(row["prompt_ids"]) + 2 + longest


@dataclass(frozen=True)
class CoconutCollator:
    """Pad tokenised rows to a batch from which every stage's texts can be cut (:func:`cut_texts`).

    Attributes:
        parts: a row's written chain in parts, one a step, then the answer.
        pad_id: id of padding.
    """

    parts: Callable[[TokenizedRow], list[list[int]]]
    pad_id: int

    def __call__(self, rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
        """Collate ``rows``.

        Returns:
            All int64: ``input_ids`` and ``attention_mask`` (B, P), prompts padded on the left; ``text_ids`` (B, L),
            whole chains, with ``IGNORE_INDEX`` behind; ``part_starts`` (B, T + 1), where in its chain each part
            begins, the answer's place repeated for chains of fewer than T steps.
        """
        parts = [self.parts(row) for row in rows]
        starts = [[0, *accumulate(len(part) for part in chain[:-1])] for chain in parts]
        most = max(map(len, starts))
        prompts = [list(row["prompt_ids"]) for row in rows]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        texts = [[token for part in chain for token in part] for chain in parts]
        length = max(map(len, texts))
        return {
            "input_ids": torch.tensor(
                [[self.pad_id] * gap + prompt for gap, prompt in zip(padding, prompts, strict=True)]
            ),
            "attention_mask": torch.tensor(
                [[0] * gap + [1] * len(prompt) for gap, prompt in zip(padding, prompts, strict=True)]
            ),
            "text_ids": torch.tensor([text + [IGNORE_INDEX] * (length - len(text)) for text in texts]),
            "part_starts": torch.tensor([places + places[-1:] * (most - len(places)) for places in starts]),
        }


def cut_texts(batch: Mapping[str, Tensor], num_steps: int | None) -> Tensor:
    """Return what is left of a batch's chains without their first steps.

    Args:
        batch: a collated batch.
        num_steps: steps to leave out; None for all, which leaves the answers.

    Returns:
        (B, Q) int64 labels, padded on the right with ``IGNORE_INDEX``.
    """
    texts, starts = batch["text_ids"], batch["part_starts"]
    last = starts.shape[1] - 1
    start = starts[:, last if num_steps is None else min(num_steps, last)]
    columns = torch.arange(texts.shape[1]) + start[:, None]
    cut = texts.gather(1, columns.clamp(max=texts.shape[1] - 1))
    cut = cut.masked_fill(columns >= texts.shape[1], IGNORE_INDEX)
    return cut[:, : int((cut != IGNORE_INDEX).sum(1).max())]
