"""Logged metrics of each block, and a one-line summary under the progress bar."""

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
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from rim_peft.sequence import Labels
from rim_peft.training.losses import block_sums


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
            labels: the batch's labels.
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
                metrics[f"block_{block}/loss"] = loss / tokens
                metrics[f"block_{block}/token_accuracy"] = correct / tokens
            if samples:
                metrics[f"block_{block}/weight"] = weight / samples
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


class ReadoutProgress(ProgressCallback):
    """The Trainer's progress bar, with log lines that fit a terminal.

    The Trainer prints each entry as a dict, which fills a screen with three numbers per block. The full entries still
    reach ``state.log_history`` and the trackers of ``report_to``.
    """

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line above the bar."""
        bar: Any = self.training_bar
        if bar is not None and logs:
            bar.write(format_log(logs, step=state.global_step, max_steps=state.max_steps))


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


def format_log(logs: Mapping[str, Any], *, step: int, max_steps: int) -> str:
    """Return a log entry as one line: losses and scores, then each block's token accuracy.

    >>> format_log(
    ...     {"loss": 3.1234, "learning_rate": 3e-3, "block_1/token_accuracy": 1.0, "block_2/token_accuracy": 0.53},
    ...     step=20,
    ...     max_steps=300,
    ... )
    'step 20/300  loss 3.123  learning_rate 0.003  token accuracy by block 1.00 0.53'
    >>> format_log({"eval_loss": 2.0, "eval_accuracy": 0.25, "eval_runtime": 1.5}, step=20, max_steps=300)
    'step 20/300  eval_loss 2  eval_accuracy 0.25'
    >>> format_log({"loss": 2.5, "token_accuracy": 0.75, "stage": 1.0}, step=20, max_steps=300)
    'step 20/300  stage 1  loss 2.5  token_accuracy 0.75'
    >>> format_log({"train_runtime": 61.0, "train_loss": 1.5}, step=300, max_steps=300)
    'step 300/300  train_loss 1.5  train_runtime 61'
    """
    shown = (
        *("stage", "longest_chain", "loss", "eval_loss", "token_accuracy", "eval_accuracy"),
        *("grad_norm", "learning_rate", "train_loss", "train_runtime"),
    )
    parts = [f"step {step}/{max_steps}", *(f"{name} {logs[name]:.4g}" for name in shown if name in logs)]
    accuracies = {
        int(found[1]): value
        for name, value in logs.items()
        if (found := re.fullmatch(r"(?:eval_)?block_(\d+)/token_accuracy", name))
    }
    if accuracies:
        parts.append("token accuracy by block " + " ".join(f"{accuracies[k]:.2f}" for k in sorted(accuracies)))
    return "  ".join(parts)
