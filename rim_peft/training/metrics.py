"""What is logged of each block, summed where the numbers are made and read at the next log line."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from rim_peft.sequence import Labels
from rim_peft.training.losses import block_sums


class BlockMetrics:
    """Sums over the batches since the last log line: no number is read, and no process waited for, at each step."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._num_tokens = 0

    def add(self, log_probs: Tensor, is_top1: Tensor, labels: Labels, weights: Tensor, *, num_tokens: int) -> None:
        """Add a batch.

        Args:
            log_probs: (N,) log-probability of each label.
            is_top1: (N,) whether the label was the most likely token.
            labels: the batch's labels.
            weights: (D, K) weight of each sample's readouts.
            num_tokens: tokens of the rows, without padding.
        """
        counts = torch.stack([weights.sum(0), torch.full_like(weights[0], len(weights))])
        by_block = block_sums(log_probs, is_top1, labels.blocks, num_blocks=weights.shape[1])
        sums = torch.cat([by_block, counts.float()])
        if self._sums is not None:  # batches may differ in their number of blocks
            most = max(sums.shape[1], self._sums.shape[1])
            sums = pad(sums, (0, most - sums.shape[1])) + pad(self._sums, (0, most - self._sums.shape[1]))
        self._sums = sums
        self._num_tokens += num_tokens

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], int]:
        """Return the metrics and the number of tokens over all processes, and begin anew."""
        if self._sums is None:
            return {}, 0
        table = accelerator.reduce(accelerator.pad_across_processes(self._sums, dim=1), reduction="sum")
        tokens_of_all = accelerator.reduce(torch.tensor(self._num_tokens, device=table.device), reduction="sum")
        metrics = {}
        for block, (loss, correct, tokens, weight, samples) in enumerate(table.T.tolist(), start=1):
            if tokens:
                metrics[f"block_{block}/loss"] = loss / tokens
                metrics[f"block_{block}/token_accuracy"] = correct / tokens
            metrics[f"block_{block}/weight"] = weight / samples
        self._sums, self._num_tokens = None, 0
        return metrics, int(tokens_of_all)
