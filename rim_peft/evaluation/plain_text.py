"""What an adapter does to the base's prediction of plain text: how much of it was forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rim_peft.inference.mode import evaluation_mode
from rim_peft.tuner.compatibility import num_positions
from rim_peft.tuner.config import active_config
from rim_peft.tuner.layers import input_device


@dataclass(frozen=True)
class Change:
    """Mean loss in nats per token, and by how much it is above the base's, with the standard error over windows."""

    loss: float
    change: float = 0.0
    standard_error: float = 0.0


@dataclass(frozen=True)
class TextLoss:
    """The loss of plain text under the base alone and with an adapter.

    Attributes:
        num_windows: windows of text.
        context_tokens: tokens at the beginning of a window, which are read and not predicted.
        predicted_tokens: tokens behind them, which are.
        num_blocks: blocks of ``with_blocks``.
        base: the base, the adapter disabled.
        without_blocks: the adapter's LoRA weights, no blocks.
        with_blocks: the adapter with blocks between context and predicted tokens; None for one that has none.
    """

    num_windows: int
    context_tokens: int
    predicted_tokens: int
    num_blocks: int
    base: Change
    without_blocks: Change
    with_blocks: Change | None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON takes it, rounded to 4 digits."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            found[name] = {k: round(v, 4) for k, v in vars(value).items()} if isinstance(value, Change) else value
        return found


def measure_text_loss(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_blocks: int | None = None,
    context_tokens: int = 96,
    predicted_tokens: int = 96,
    batch_size: int = 4,
    progress: bool = False,
) -> TextLoss:
    """Measure the loss of texts in windows of the same length, with and without adapter and blocks.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer; no special tokens are added.
        texts: plain texts; what is left of one behind its last whole window is not used.
        num_blocks: blocks between context and predicted tokens; the adapter's own if not given.
        context_tokens: tokens of a window that are read and not predicted, at least 1.
        predicted_tokens: tokens behind them, at least 1.
        batch_size: windows at a time.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the texts have less than two windows, or a window with its blocks does not fit into the base's
            positions.
    """
    size = context_tokens + predicted_tokens
    windows = [window for text in texts for window in _windows(tokenizer, text, size)]
    if len(windows) < 2:
        raise ValueError(
            f"text: must have at least two windows of {size} tokens, got {len(windows)} in {len(texts)} texts. Give "
            "longer texts."
        )
    config = active_config(model)
    count = config.num_blocks if num_blocks is None else num_blocks
    blocks = config.block_tokens.ids(count) if count else []
    room = num_positions(model.config)
    if room is not None and size + len(blocks) > room:
        raise ValueError(
            f"num_blocks: must leave room for a window of text, got {count}: with its {size} tokens it takes "
            f"{size + len(blocks)} positions, and the base has {room} (max_position_embeddings). Lower it."
        )
    inserted = {"base": [], "without_blocks": [], "with_blocks": blocks}
    losses: dict[str, list[float]] = {name: [] for name in inserted if name != "with_blocks" or count}
    with (
        evaluation_mode(model),
        torch.no_grad(),
        tqdm(total=len(windows) * len(losses), desc="Reading", unit="window", disable=not progress) as bar,
    ):
        for start in range(0, len(windows), batch_size):
            batch = torch.tensor(windows[start : start + batch_size], device=input_device(model))
            context, predicted = batch[:, :context_tokens], batch[:, context_tokens:]
            for name, found in losses.items():
                with model.disable_adapter() if name == "base" else nullcontext():
                    found += _losses(model, context, inserted[name], predicted)
                bar.update(len(batch))
    changes = {name: _change(found, losses["base"]) for name, found in losses.items()}
    return TextLoss(
        num_windows=len(windows),
        context_tokens=context_tokens,
        predicted_tokens=predicted_tokens,
        num_blocks=count,
        base=changes["base"],
        without_blocks=changes["without_blocks"],
        with_blocks=changes.get("with_blocks"),
    )


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> Iterator[list[int]]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    for start in range(0, len(ids) - size + 1, size):
        yield ids[start : start + size]


def _losses(model: Any, context: Tensor, blocks: list[int], predicted: Tensor) -> list[float]:
    """Return the mean loss of each window's predicted tokens; all windows are of one length, so nothing is padded."""
    between = torch.tensor(blocks, dtype=context.dtype, device=context.device).expand(len(context), -1)
    logits = model(input_ids=torch.cat([context, between, predicted], dim=1), use_cache=False).logits
    logits = logits[:, -predicted.shape[1] - 1 : -1].float()
    log_probs = logits.log_softmax(-1).gather(-1, predicted.to(logits.device)[..., None])[..., 0]
    losses: list[float] = (-log_probs.mean(dim=1)).tolist()
    return losses


def _change(losses: list[float], base: list[float]) -> Change:
    differences = [mine - its for mine, its in zip(losses, base, strict=True)]
    return Change(fmean(losses), fmean(differences), stdev(differences) / len(differences) ** 0.5)
