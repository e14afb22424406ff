"""Estimate a stage's cost before training: its rows' lengths, its steps and batches, and its peak memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import RandomSampler
from transformers import PreTrainedTokenizerBase

from rim_peft.data.batching import TokenBatchSampler
from rim_peft.data.chats import Chat
from rim_peft.data.examples import BadRowsError, RowError, Templates, read_example
from rim_peft.data.objective import Objective, TokenizedRow
from rim_peft.data.preparation import prepare_dataset
from rim_peft.data.special_tokens import template_variables
from rim_peft.data.tokenization import Encoder
from rim_peft.sequence import Layout
from rim_peft.training.head import Head
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import arrange_rows
from rim_peft.training.simulation import StepMemory, optimizer_bytes, simulate_step

TEXT_TOKENS = 8
"""Tokens of each step and answer in a row of which only the length is given."""


@dataclass(frozen=True)
class StageRows:
    """Rows as a stage lays them out.

    Attributes:
        rows: tokenised rows that the stage can train on.
        lengths: tokens of each: prompt, blocks and readouts.
        bad: index of each row that it cannot train on, with the reason.
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
    """Tokenise rows as a stage does, and count each row's tokens.

    Args:
        max_positions: number of the base's positions; None if unlimited.

    Raises:
        ValueError: all rows are bad, or the tokenizer cannot encode them.
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
    """Return an artificial tokenised row of ``length`` tokens: short texts, and a prompt that takes the rest.

    Args:
        length: tokens of the row; if its blocks and readouts exceed that, the prompt has one token.
        num_blocks: the adapter's; the row has that many steps.
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
    """Return index and reason of each row that is bad whatever the tokenizer."""
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
    """Count rows with a text that a tokenizer changes, apart from white space; also return a text before and after.

    Unreadable rows are skipped.
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


def find_unread(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """Count rows with chat_template_kwargs that no chat template of a tokenizer reads; also return their names."""
    known = template_variables(tokenizer)
    unread = []
    for row in rows:
        with suppress(RowError):
            question = read_example(row).question
            if isinstance(question, Chat) and (names := question.chat_template_kwargs.keys() - known):
                unread.append(names)
    return len(unread), sorted(set().union(*unread))


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
    """Return the row indices of the batch that takes the most memory.

    With a fixed number of rows per batch, it has the longest rows. With ``max_tokens_per_batch``, it is the largest
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
    """Count a stage's steps on one device, as the Trainer does; None if that needs the unknown number of batches."""
    if args.max_steps > 0:
        return int(args.max_steps)
    if num_batches is None:
        return None
    in_epoch = max(1, math.ceil(num_batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * in_epoch)


@dataclass(frozen=True)
class BatchSize:
    """A batch as the model sees it: ``samples`` in ``rows`` rows of ``length`` tokens, padding included."""

    samples: int
    rows: int
    length: int


@dataclass(frozen=True)
class PeakMemory(StepMemory):
    """Bytes that training holds at its peak: all parts of a step, and the optimiser's state.

    Attributes:
        optimizer: the optimiser's state; None if unknown, and then not in the total.
    """

    optimizer: int | None

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.adapter + (self.optimizer or 0) + self.step


def precision(values: dict[str, Any], *, device: str) -> torch.dtype | None:
    """Return the type of a stage's mixed precision on a device, None for none.

    Args:
        values: the stage's options in the recipe; bf16 defaults to on if the GPU supports it.
        device: ``"cuda"`` or ``"cpu"``; a GPU of another machine is assumed to support bf16.
    """
    if values.get("fp16"):
        return torch.float16
    bf16 = values.get("bf16")
    if bf16 is None:
        bf16 = device == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    return torch.bfloat16 if bf16 else None


def estimate(
    model: PeftModel,
    objective: Objective,
    args: ReadoutConfig,
    rows: Sequence[TokenizedRow],
    *,
    autocast: torch.dtype | None,
    device: str,
    head: Head = Head.FUSED,
) -> tuple[BatchSize, PeakMemory]:
    """Simulate a stage's step on a batch in which all readouts count.

    Args:
        model: base and adapter on the device ``meta``; consumed by this call.
        rows: the batch, tokenised.
        autocast: type of mixed precision, None for none.
    """
    kind: Any = args.gradient_checkpointing_kwargs or {}
    layout, weights = arrange(objective, args, rows)
    prepare(model, objective, args)
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    found = simulate_step(
        model,
        layout,
        weights,
        checkpointing=bool(args.gradient_checkpointing),
        reentrant=kind.get("use_reentrant"),
        autocast=autocast,
        accumulates=args.gradient_accumulation_steps > 1,
        on_gpu=device == "cuda",
        head=head,
    )
    has_momentum = "momentum" in (args.optim_args or "")
    optimizer = optimizer_bytes(str(getattr(args.optim, "value", args.optim)), shapes, has_momentum=has_momentum)
    num_rows, length = layout.input_ids.shape
    return BatchSize(len(rows), num_rows, length), PeakMemory(optimizer=optimizer, **asdict(found))


def prepare(model: PeftModel, objective: Objective, args: ReadoutConfig) -> None:
    """Set a model up as the stage's trainer does: trained parameters and LoRA's dropout."""
    base_model: Any = model.base_model
    base_model.memory.rows(model.active_adapter).requires_grad_(objective.trains_memory)
    if args.dropout is not None:
        base_model.set_dropout(args.dropout)


def arrange(objective: Objective, args: ReadoutConfig, rows: Sequence[TokenizedRow]) -> tuple[Layout, torch.Tensor]:
    """Return a batch's rows and its readouts' weights, arranged as in the trainer's loss when all readouts count."""
    batch = objective.collator(pad_id=0)(rows)
    num_steps = batch.pop("num_steps")
    layout = Layout(**batch)
    weights = objective.weights(num_steps, (layout.block_ends >= 0).sum(dim=1), progress=None)
    return arrange_rows(args, layout, weights), weights


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """Count trained and frozen numbers of a model on the device ``meta``, where weights are not packed yet."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += math.prod(parameter.shape)
    return sizes[True], sizes[False]
