"""What a training shows while it runs: a line for each log entry and, in a terminal, a table of blocks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState

from rim_peft.training.metrics import by_block
from rim_peft.training.samples import Sample, spread
from rim_peft.values import cut

_MOST_BLOCKS = 12
_MOST_SAMPLES = 3
_CELLS = 20
_LONGEST_TEXT = 32


class ReadoutProgress(ProgressCallback):
    """The Trainer's progress bar, with log lines that fit a terminal and, if stderr is one, a table of blocks below.

    The Trainer prints each entry as a dict, which fills a screen with three numbers per block. The full entries still
    reach ``state.log_history`` and the trackers of ``report_to``. Rows of the table are bars of tqdm that show only a
    text: so bar, table and whatever else is written through tqdm never overwrite one another.

    Args:
        stage: name of the training, for the table.
    """

    training_bar: Any
    prediction_bar: Any

    def __init__(self, stage: str = "") -> None:
        super().__init__()
        self._stage = stage
        self._rows: list[Any] = []
        self._train: Mapping[str, Any] = {}
        self._scores: Mapping[str, Any] = {}
        self._samples: Sequence[Sample] = ()
        self._open = ExitStack()

    @property
    def is_live(self) -> bool:
        """Whether there is a table, which needs a bar in a terminal that can move its cursor."""
        return self.training_bar is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the bar; log messages that go to the terminal are written above it from now on."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.is_live:
            loggers = [logging.getLogger(name) for name in (None, "transformers")]
            on_console = [each for each in loggers if any(type(one) is logging.StreamHandler for one in each.handlers)]
            self._open.enter_context(logging_redirect_tqdm(on_console))

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line above the bar, and update the table."""
        bar = self.training_bar
        if bar is None or not logs:
            return
        bar.write(format_log(logs, step=state.global_step, max_steps=state.max_steps))
        if "loss" in logs:
            self._train = dict(logs)
        elif any(name.startswith("eval_") for name in logs):
            self._scores = {name: value for name, value in logs.items() if name in ("eval_loss", "eval_accuracy")}
        self._draw()

    def show_samples(self, samples: Sequence[Sample]) -> None:
        """Show sample readouts below the table."""
        self._samples = samples
        self._draw()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the table and leave the bar."""
        self.close()

    def close(self) -> None:
        """Remove the table and leave the bar, also after a training that ended with an error."""
        for row in self._rows:
            row.close()
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self._rows, self.prediction_bar, self.training_bar = [], None, None
        self._open.close()

    def _draw(self) -> None:
        if not self.is_live:
            return
        lines = table_lines({**self._scores, **self._train}, stage=self._stage)
        lines += [sample_line(sample) for sample in self._samples[:_MOST_SAMPLES]]
        for position in range(len(self._rows) + 1, len(lines) + 1):
            row = tqdm(total=0, bar_format="{desc}", dynamic_ncols=True, leave=False, position=position)
            self._rows.append(row)
        encoding = getattr(sys.stderr, "encoding", None) or "ascii"
        for row, line in zip(self._rows, [*lines, *[""] * (len(self._rows) - len(lines))], strict=True):
            row.set_description_str(line.encode(encoding, "backslashreplace").decode(encoding))


def table_lines(logs: Mapping[str, Any], *, stage: str) -> list[str]:
    """Return the table of blocks: a line about the stage, then a line for each block that the last log entry has.

    >>> logs = {"loss": 2.0, "longest_chain": 2.0, "loss_by_block/1": 0.5, "token_accuracy_by_block/1": 0.8}
    >>> print(*table_lines({**logs, "weight_by_block/1": 1.0}, stage="grounding"), sep="\\n")
    grounding  loss 2  longest chain 2
    block      loss  token accuracy              weight
        1    0.5000  0.80 ################....  1.00
    """
    names = {
        "loss": "loss",
        "token_accuracy": "token accuracy",
        "longest_chain": "longest chain",
        "stage": "thoughts' stage",
        "num_layers": "layers",
        "eval_loss": "validation loss",
        "eval_accuracy": "validation accuracy",
    }
    lines = ["  ".join([stage, *(f"{text} {logs[name]:.4g}" for name, text in names.items() if name in logs)])]
    losses, accuracies, weights = (by_block(logs, metric) for metric in ("loss", "token_accuracy", "weight"))
    blocks = spread(sorted({*losses, *weights}), _MOST_BLOCKS)
    if blocks:
        lines.append("block      loss  token accuracy              weight")
    for block in blocks:
        loss = f"{losses[block]:.4f}" if block in losses else "-"
        right = f"{accuracies[block]:.2f} {_bar(accuracies[block])}" if block in accuracies else ""
        weight = f"{weights[block]:.2f}" if block in weights else "-"
        lines.append(f"{block:>5}  {loss:>8}  {right:<{_CELLS + 5}}  {weight}")
    return lines


def sample_line(sample: Sample) -> str:
    """Return a sample's readouts as one line.

    >>> sample_line(Sample("1 + 2 + 3?", {"block 1": "3+3=6", "block 2": "6"}, answer="6", is_right=True))
    'right  1 + 2 + 3?: 3+3=6 | 6'
    >>> sample_line(Sample("1 + 2 + 3?", {"block 1": "3+3=6", "block 2": "5"}, answer="6", is_right=False))
    'wrong  1 + 2 + 3?: 3+3=6 | 5  (answer 6)'
    """
    question, answer = cut(sample.question, most=_LONGEST_TEXT), cut(sample.answer, most=_LONGEST_TEXT)
    texts = " | ".join(cut(text, most=_LONGEST_TEXT) for text in sample.readouts.values())
    verdict, gold = ("right", "") if sample.is_right else ("wrong", f"  (answer {answer})")
    return f"{verdict}  {question}: {texts}{gold}"


def _bar(share: float) -> str:
    full = round(min(max(share, 0.0), 1.0) * _CELLS)
    return "#" * full + "." * (_CELLS - full)


def format_log(logs: Mapping[str, Any], *, step: int, max_steps: int) -> str:
    """Return a log entry as one line: losses and scores, then each block's token accuracy.

    >>> format_log(
    ...     {"loss": 3.1234, "token_accuracy_by_block/1": 1.0, "token_accuracy_by_block/2": 0.53},
    ...     step=20,
    ...     max_steps=300,
    ... )
    'step 20/300  loss 3.123  token accuracy by block 1.00 0.53'
    >>> format_log({"eval_loss": 2.0, "eval_accuracy": 0.25, "eval_runtime": 1.5}, step=20, max_steps=300)
    'step 20/300  eval_loss 2  eval_accuracy 0.25'
    >>> format_log({"eval_hard_loss": 2.0, "eval_hard_token_accuracy_by_block/1": 0.5}, step=20, max_steps=300)
    'step 20/300  eval_hard_loss 2  token accuracy by block 0.50'
    >>> format_log({"loss": 2.5, "token_accuracy": 0.75, "stage": 1.0}, step=20, max_steps=300)
    'step 20/300  stage 1  loss 2.5  token_accuracy 0.75'
    >>> format_log({"train_runtime": 61.0, "train_loss": 1.5}, step=300, max_steps=300)
    'step 300/300  train_loss 1.5  train_runtime 61'
    """
    losses = (name for name in logs if name.startswith("eval_") and name.endswith("_loss"))
    evaluation = next(losses, "eval_loss").removesuffix("loss")  # several sets of rows have names of their own
    shown = (
        *("stage", "longest_chain", "loss", f"{evaluation}loss", "token_accuracy", f"{evaluation}accuracy"),
        *("grad_norm", "learning_rate", "train_loss", "train_runtime"),
    )
    parts = [f"step {step}/{max_steps}", *(f"{name} {logs[name]:.4g}" for name in shown if name in logs)]
    accuracies = by_block(logs, "token_accuracy") or by_block(logs, "token_accuracy", prefix=evaluation)
    if accuracies:
        parts.append("token accuracy by block " + " ".join(f"{value:.2f}" for value in accuracies.values()))
    return "  ".join(parts)
