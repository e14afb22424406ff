"""How much an adapter changes the base's loss on plain text: a measure of forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Templates
from rim_peft.data.tokenization import Encoder
from rim_peft.tuner.bases import evaluation_mode, input_device, num_positions
from rim_peft.tuner.config import active_config
from rim_peft.values import check_integer, shown


@dataclass(frozen=True)
class Change:
    """Mean loss in nats per token, and its increase over the base with the standard error over windows."""

    loss: float
    change: float = 0.0
    standard_error: float = 0.0


@dataclass(frozen=True)
class TextLoss:
    """The loss on plain text of the base alone and with an adapter.

    Attributes:
        num_windows: windows of text.
        context_tokens: tokens at the start of a window that are read and not predicted.
        predicted_tokens: tokens after them, which are predicted.
        num_blocks: blocks of ``with_blocks``.
        base: the base, the adapter disabled.
        without_blocks: the adapter's LoRA weights, no blocks.
        with_blocks: the adapter with blocks between context and predicted tokens; None for an adapter without blocks.
    """

    num_windows: int
    context_tokens: int
    predicted_tokens: int
    num_blocks: int
    base: Change
    without_blocks: Change
    with_blocks: Change | None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields ready for JSON, rounded to 4 digits."""
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
    """Measure the loss on windows of equal length, with and without adapter and blocks.

    Args:
        tokenizer: the base's tokenizer; each window begins as it begins texts (with BOS if it adds one).
        texts: plain texts, in which special tokens are text; the rest after a text's last whole window is not used.
        num_blocks: blocks between context and predicted tokens; by default the adapter's own number.
        context_tokens: tokens of a window that are read and not predicted, at least 1.
        predicted_tokens: tokens after them, at least 1.

    Raises:
        ValueError: a number is out of range; a text has no window, or there are fewer than two in all; a window with
            its blocks does not fit into the base's positions; LoRA is merged; or a loss is not finite.
    """
    count = active_config(model).num_blocks if num_blocks is None else num_blocks
    _check(
        model, num_blocks=count, context_tokens=context_tokens, predicted_tokens=predicted_tokens, batch_size=batch_size
    )
    blocks = active_config(model).block_tokens.ids(count) if count else []
    encoder = Encoder(tokenizer, Templates())
    begin = encoder.encode_guarded("", begins=True)
    size = context_tokens + predicted_tokens
    room = num_positions(model.config)
    if room is not None and len(begin) + size + len(blocks) > room:
        raise ValueError(
            f"context_tokens, predicted_tokens, num_blocks: must fit into the base's {room} positions "
            f"(max_position_embeddings), got {context_tokens} + {predicted_tokens} tokens and {len(blocks)} of {count} "
            "blocks. Lower them."
        )
    windows = [begin + window for window in _cut_windows(texts, encoder, size)]
    losses = _measure(model, windows, blocks, predicted_tokens, batch_size=batch_size, progress=progress)
    changes = {name: _change(name, found, losses["base"]) for name, found in losses.items()}
    return TextLoss(
        num_windows=len(windows),
        context_tokens=context_tokens,
        predicted_tokens=predicted_tokens,
        num_blocks=count,
        base=changes["base"],
        without_blocks=changes["without_blocks"],
        with_blocks=changes.get("with_blocks"),
    )


def _measure(
    model: PeftModel,
    windows: Sequence[Sequence[int]],
    blocks: list[int],
    predicted_tokens: int,
    *,
    batch_size: int,
    progress: bool,
) -> dict[str, list[float]]:
    """Return each window's loss on the base, on the adapter without blocks and, if there are blocks, with them."""
    inserted = {"base": [], "without_blocks": [], "with_blocks": blocks}
    losses: dict[str, list[float]] = {name: [] for name in inserted if name != "with_blocks" or blocks}
    with (
        evaluation_mode(model),
        _same_trainable(model),
        torch.no_grad(),
        tqdm(total=len(windows) * len(losses), desc="Reading", unit="window", disable=not progress) as bar,
    ):
        for start in range(0, len(windows), batch_size):
            batch = torch.tensor(windows[start : start + batch_size], device=input_device(model))
            context, predicted = batch[:, :-predicted_tokens], batch[:, -predicted_tokens:]
            for name, found in losses.items():
                with model.disable_adapter() if name == "base" else nullcontext():
                    found += _losses(model, context, inserted[name], predicted)
                bar.update(len(batch))
    return losses


def _check(model: PeftModel, *, num_blocks: int, **sizes: int) -> None:
    check_integer("num_blocks", num_blocks, least=0)
    for name, value in sizes.items():
        check_integer(name, value, least=1)
    memory: Any = model.base_model.memory
    if memory.merged_adapters:
        raise ValueError("model: must not be merged, which hides its base. Call unmerge_adapter() first.")


def _cut_windows(texts: Sequence[str], encoder: Encoder, size: int) -> list[list[int]]:
    windows: list[list[int]] = []
    for number, text in enumerate(texts, start=1):
        ids = encoder.encode_guarded(encoder.guard(text), begins=False)
        if len(ids) < size:
            raise ValueError(
                f"text: each must have at least one window of {size} tokens, got {len(ids)} in text {number} "
                f"({shown(text)}). Omit it, or join short texts."
            )
        windows += [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    if len(windows) < 2:
        raise ValueError(
            f"text: must have at least two windows of {size} tokens, got {len(windows)} in {len(texts)} texts. Give "
            "longer texts."
        )
    return windows


@contextmanager
def _same_trainable(model: nn.Module) -> Iterator[None]:
    """Keep ``requires_grad`` flags: PEFT sets them when a disabled adapter is enabled again."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)


def _losses(model: Any, context: Tensor, blocks: list[int], predicted: Tensor) -> list[float]:
    """Return the mean loss of each window's predicted tokens; windows have equal length, so there is no padding."""
    between = torch.tensor(blocks, dtype=context.dtype, device=context.device).expand(len(context), -1)
    logits = model(input_ids=torch.cat([context, between, predicted], dim=1), use_cache=False).logits
    logits = logits[:, -predicted.shape[1] - 1 : -1].float()
    log_probs = logits.log_softmax(-1).gather(-1, predicted.to(logits.device)[..., None])[..., 0]
    losses: list[float] = (-log_probs.mean(dim=1)).tolist()
    return losses


def _change(name: str, losses: list[float], base: list[float]) -> Change:
    if not all(map(math.isfinite, losses)):
        raise ValueError(
            f"model: its loss must be finite, got {shown(losses)} for {name.replace('_', ' ')}. Check the adapter's "
            "training."
        )
    differences = [mine - its for mine, its in zip(losses, base, strict=True)]
    return Change(fmean(losses), fmean(differences), stdev(differences) / len(differences) ** 0.5)
