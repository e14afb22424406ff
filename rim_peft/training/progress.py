"""One short line for each log entry, under the progress bar."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState


class ReadoutProgress(ProgressCallback):
    """The Trainer's progress bar, with log lines that fit into a terminal.

    The Trainer prints each entry as a dict, which with three numbers for every block fills a screen. All of them still
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
    """The seconds of a training, evaluation included; one that is resumed goes on from its checkpoint.

    Attributes:
        before: seconds of the parts before a resumption.
    """

    def __init__(self) -> None:
        self._started, self.before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start, with the seconds that a checkpoint holds."""
        kept: Any = state.stateful_callbacks
        part = kept.get(type(self).__name__)
        self._started, self.before = time.perf_counter(), part["attributes"]["before"] if part else 0.0

    def keep(self, state: TrainerState) -> None:
        """Write the seconds so far into what a checkpoint is about to hold."""
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
