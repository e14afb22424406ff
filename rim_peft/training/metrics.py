"""Logged metrics of each block, and the clock of a training."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback, TrainerControl, TrainerState

from rim_peft.sequence import Labels
from rim_peft.training.losses import block_sums


def block_metric(metric: str, block: int) -> str:
    """Return the name under which a block's metric is logged.

    Trackers put what is before the last slash into one group, so that all blocks of a metric are side by side.

    >>> block_metric("loss", 3)
    'loss_by_block/3'
    """
    return f"{metric}_by_block/{block}"


def current_name(name: str) -> str:
    """Return a metric's name; a block's metric may have the name that earlier versions gave it.

    >>> current_name("eval_block_3/token_accuracy"), current_name("accuracy")
    ('eval_token_accuracy_by_block/3', 'accuracy')
    """
    return re.sub(r"^(eval_)?block_(\d+)/(loss|token_accuracy|weight)$", r"\1\3_by_block/\2", name)


def by_block(logs: Mapping[str, Any], metric: str, *, prefix: str = "") -> dict[int, Any]:
    """Return a metric's value for each block in a log line, block 1 first; names of earlier versions count too.

    >>> by_block({"loss": 2.0, "loss_by_block/10": 0.5, "loss_by_block/2": 1.5}, "loss")
    {2: 1.5, 10: 0.5}
    >>> by_block({"eval_block_1/loss": 1.0, "block_1/loss": 2.0}, "loss", prefix="eval_")
    {1: 1.0}

    Args:
        metric: ``"loss"``, ``"token_accuracy"`` or ``"weight"``.
        prefix: ``"eval_"`` for what an evaluation logged, ``"eval_<name>_"`` with several sets of rows.
    """
    pattern = re.compile(rf"{re.escape(prefix)}(?:{metric}_by_block/(\d+)|block_(\d+)/{metric})")
    found = {int(match[1] or match[2]): value for name, value in logs.items() if (match := pattern.fullmatch(name))}
    return dict(sorted(found.items()))


class Metrics(ABC):
    """Sums over the batches since the last log line; adding a batch waits for neither the device nor processes."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @abstractmethod
    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all processes and reset the sums; every process must call it."""

    def running(self, accelerator: Accelerator) -> list[Any] | None:
        """Return each process's sums so far at full precision, None without any; every process must call it."""
        if self._sums is None:
            return None
        last = self._sums.dim() - 1
        return accelerator.gather(accelerator.pad_across_processes(self._sums, dim=last)[None]).tolist()

    def go_on(self, running: list[Any] | None, *, process: int, device: torch.device) -> None:
        """Continue from the sums that :meth:`running` returned."""
        self._sums = None if running is None else torch.tensor(running[process], device=device)


class BlockMetrics(Metrics):
    """Each block's loss, token accuracy and weight."""

    def add(self, log_probs: Tensor, is_top1: Tensor, labels: Labels, weights: Tensor, has_block: Tensor) -> None:
        """Add a batch.

        Args:
            log_probs: (N,) log-probability of each label.
            is_top1: (N,) whether the label was the most likely token.
            weights: (D, K) weight of each sample's readouts.
            has_block: (D, K) whether the sample has that block.
        """
        by_block = block_sums(log_probs, is_top1, labels.blocks, num_blocks=weights.shape[1])
        sums = torch.cat([by_block, weights.sum(0)[None].float(), has_block.sum(0)[None].float()])
        if self._sums is not None:  # batches may have different numbers of blocks
            most = max(sums.shape[1], self._sums.shape[1])
            sums = pad(sums, (0, most - sums.shape[1])) + pad(self._sums, (0, most - self._sums.shape[1]))
        self._sums = sums

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all processes and reset the sums; every process must call it."""
        if self._sums is None:
            return {}
        table = accelerator.reduce(accelerator.pad_across_processes(self._sums, dim=1), reduction="sum")
        self._sums = None
        metrics = {}
        for block, (loss, correct, tokens, weight, samples) in enumerate(table.T.tolist(), start=1):
            if tokens:
                metrics[block_metric("loss", block)] = loss / tokens
                metrics[block_metric("token_accuracy", block)] = correct / tokens
            if samples:
                metrics[block_metric("weight", block)] = weight / samples
        return metrics


class TextMetrics(Metrics):
    """Token accuracy of texts since the last log line."""

    def add(self, is_top1: Tensor, is_label: Tensor) -> None:
        """Add a batch.

        Args:
            is_top1: (B, Q) whether the label was the most likely token.
            is_label: (B, Q) whether there is a label, both bool.
        """
        sums = torch.stack([(is_top1.bool() & is_label).sum(), is_label.sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metric over all processes and reset the sums; every process must call it."""
        if self._sums is None:
            return {}
        correct, tokens = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        return {"token_accuracy": correct / tokens}


class TrainingClock(TrainerCallback):
    """Measures the seconds of a training, evaluation included; a resumed training continues from its checkpoint.

    Attributes:
        before: seconds before the training was resumed.
    """

    def __init__(self) -> None:
        self._started, self.before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start, with the seconds from the checkpoint."""
        kept: Any = state.stateful_callbacks
        part = kept.get(type(self).__name__)
        self._started, self.before = time.perf_counter(), part["attributes"]["before"] if part else 0.0

    def keep(self, state: TrainerState) -> None:
        """Put the seconds so far into the state that a checkpoint is about to save."""
        kept: Any = state.stateful_callbacks
        kept[type(self).__name__] = {"args": {}, "attributes": {"before": self.seconds}}
