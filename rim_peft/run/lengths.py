"""How long a stage's rows are, how many steps it takes, and the largest of its batches, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import RandomSampler
from transformers import PreTrainedTokenizerBase

from rim_peft.data.batching import TokenBatchSampler
from rim_peft.data.collator import TokenizedRow
from rim_peft.data.examples import BadRowsError, RowError, Templates, read_example
from rim_peft.data.objective import Objective
from rim_peft.data.preparation import prepare_dataset
from rim_peft.data.tokenization import Encoder
from rim_peft.training.readout_config import ReadoutConfig

TEXT_TOKENS = 8
"""Tokens of each step and answer in a row of which nothing but its length is stated."""


@dataclass(frozen=True)
class StageRows:
    """Rows as a stage lays them out.

    Attributes:
        rows: tokenised rows that the stage can train on.
        lengths: tokens of each: prompt, blocks and readouts.
        bad: index and reason of rows that it cannot train on.
    """

    rows: Dataset
    lengths: Sequence[int]
    bad: Sequence[tuple[int, str]]


def lay_out(
    objective: Objective,
    args: ReadoutConfig,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int | None,
) -> StageRows:
    """Tokenise rows as a stage does, and count each one's tokens.

    Args:
        objective: what the stage trains of a row.
        args: the stage's options.
        rows: rows with question, steps and answer.
        tokenizer: the base's.
        max_positions: positions that the base has; None for any number.

    Raises:
        ValueError: the rows are bad throughout, or the tokenizer cannot write them.
    """
    options: dict[str, Any] = {
        "templates": args.templates,
        "max_length": args.max_length,
        "max_positions": max_positions,
        "num_proc": args.dataset_num_proc,
    }
    bad: Sequence[tuple[int, str]] = ()
    try:
        prepared = prepare_dataset(rows, tokenizer, objective, **options)
    except BadRowsError as error:
        bad = error.rows
        if len(bad) == len(rows):
            raise
        prepared = prepare_dataset(rows, tokenizer, objective, **options, on_bad_rows="drop")
    if not isinstance(prepared, Dataset):
        raise ValueError("data.streaming: a stream's rows have no lengths before they are read.")
    return StageRows(prepared, [objective.num_tokens(row) for row in prepared], bad)


def stated_row(objective: Objective, length: int, *, num_blocks: int) -> TokenizedRow:
    """Return a tokenised row of so many tokens, for want of real ones: short texts, and a prompt that takes the rest.

    Args:
        objective: what the stage trains of a row.
        length: tokens of the row; one that its blocks and readouts exceed gets a prompt of one token.
        num_blocks: of the adapter; the row has as many steps.
    """
    num_steps = max(1, num_blocks)
    row: TokenizedRow = {"prompt_ids": [], "step_ids": [[0]] * num_steps, "answer_ids": [0]}
    num_steps = max(1, num_steps - max(0, len(objective.readouts(row)) - num_steps))
    for size in range(TEXT_TOKENS, 0, -1):
        row = {"prompt_ids": [], "step_ids": [[0] * size] * num_steps, "answer_ids": [0] * size}
        left = length - objective.num_tokens(row)
        if left >= 1:
            break
    return {**row, "prompt_ids": [0] * max(1, left)}


def find_unreadable(rows: Iterable[Mapping[str, Any]], *, needs_steps: bool) -> list[tuple[int, str]]:
    """Return index and reason of rows that no tokenizer could make good."""
    bad = []
    for index, row in enumerate(rows):
        try:
            if read_example(row).steps is None and needs_steps:
                raise RowError("steps: there are none, and this training needs at least one")
        except RowError as error:
            bad.append((index, str(error)))
    return bad


def find_changed(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, templates: Templates
) -> tuple[int, tuple[str, str] | None]:
    """Count rows with a text that a tokenizer changes, white space aside; with one such text and what it becomes.

    Rows that cannot be read are not looked at.
    """
    encoder = Encoder(tokenizer, templates)
    texts: list[str] = []
    owners: list[int] = []
    for index, row in enumerate(rows):
        with suppress(RowError):
            example = read_example(row)
            question = example.question
            contents = [question] if isinstance(question, str) else [message["content"] for message in question]
            texts += [*contents, *(example.steps or ()), example.answer]
            owners += [index] * (len(texts) - len(owners))
    changed: dict[int, tuple[str, str]] = {}
    for owner, text, written in zip(owners, texts, encoder.read_back(texts), strict=True):
        if "".join(text.split()) != "".join(written.split()):
            changed.setdefault(owner, (text, written))
    return len(changed), next(iter(changed.values()), None)


def count_batches(args: Any, lengths: Sequence[int]) -> int:
    """Count the batches of an epoch on one device.

    Raises:
        ValueError: ``max_tokens_per_batch`` is too small for the longest row.
    """
    if args.max_tokens_per_batch is not None:
        return len(_by_tokens(args, lengths))
    size = args.per_device_train_batch_size
    return max(1, len(lengths) // size if args.dataloader_drop_last else math.ceil(len(lengths) / size))


def find_largest_batch(args: Any, lengths: Sequence[int]) -> list[int]:
    """Return the indices of the rows of the batch that takes most memory.

    With a number of rows for each batch, the longest rows can meet in one. Where tokens are counted, it is the largest
    batch of one epoch in a random order.

    Raises:
        ValueError: ``max_tokens_per_batch`` is too small for the longest row.
    """
    if args.max_tokens_per_batch is None:
        by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        return by_length[: args.per_device_train_batch_size]

    def size_of(batch: Sequence[int]) -> int:
        inside = [lengths[index] for index in batch]
        return sum(inside) if args.pack_length is not None else len(inside) * max(inside)

    return max(_by_tokens(args, lengths), key=size_of)


def _by_tokens(args: Any, lengths: Sequence[int]) -> list[list[int]]:
    order: Any = RandomSampler(lengths, generator=torch.Generator().manual_seed(args.seed))
    return list(TokenBatchSampler(order, lengths=lengths, max_tokens=args.max_tokens_per_batch))


def count_steps(args: Any, num_batches: int | None) -> int | None:
    """Count a stage's steps on one device, as the Trainer does; None if its batches must be known for that."""
    if args.max_steps > 0:
        return int(args.max_steps)
    if num_batches is None:
        return None
    in_epoch = max(1, math.ceil(num_batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * in_epoch)
