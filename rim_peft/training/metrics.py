"""What is logged of each block, or of a text, summed where the numbers are made and read at the next log line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from rim_peft.sequence import Labels
from rim_peft.training.losses import block_sums


class Metrics(ABC):
    """Sums over the batches since the last log line: no number is read, and no process waited for, at each step."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @abstractmethod
    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all processes, which must all ask, and begin anew."""

    def running(self, accelerator: Accelerator) -> list[Any] | None:
        """Return each process's sums so far, with all their digits; all must ask. None where there are none yet."""
        if self._sums is None:
            return None
        last = self._sums.dim() - 1
        return accelerator.gather(accelerator.pad_across_processes(self._sums, dim=last)[None]).tolist()

    def go_on(self, running: list[Any] | None, *, process: int, device: torch.device) -> None:
        """Go on from what :meth:`running` has returned."""
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
        if self._sums is not None:  # batches may differ in their number of blocks
            most = max(sums.shape[1], self._sums.shape[1])
            sums = pad(sums, (0, most - sums.shape[1])) + pad(self._sums, (0, most - self._sums.shape[1]))
        self._sums = sums

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all processes, which must all ask, and begin anew."""
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
    """Share of a text's tokens that were the likeliest, since the last log line."""

    def add(self, is_top1: Tensor, is_label: Tensor) -> None:
        """Add a batch.

        Args:
            is_top1: (B, Q) whether the label was the most likely token.
            is_label: (B, Q) whether there is a label, both bool.
        """
        sums = torch.stack([(is_top1.bool() & is_label).sum(), is_label.sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metric over all processes, which must all ask, and begin anew."""
        if self._sums is None:
            return {}
        correct, tokens = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        return {"token_accuracy": correct / tokens}
