"""Trackers: sample readouts of a few validation rows as a table in them, and a run for each stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from rim_peft.escaping import markdown
from rim_peft.values import cut

TABLE = "eval/readouts"
"""Name of the table in trackers, beside the scores of evaluations."""

_LONGEST_CELL = 500


@dataclass(frozen=True)
class Sample:
    """A question and what was read out for it.

    Attributes:
        question: the question, a chat as one text.
        readouts: texts by where they were read, such as ``"block 1"``, in order; the last one is the model's answer.
        answer: the right answer.
        is_right: whether the last readout is right.
    """

    question: str
    readouts: Mapping[str, str]
    answer: str
    is_right: bool


ReadSamples = Callable[[PeftModel], Sequence[Sample]]
"""Returns samples of a model in evaluation mode; all have readouts of the same names."""


def spread(values: Sequence[int], most: int) -> list[int]:
    """Choose values at equal distances, the last one always included.

    >>> spread([1, 2, 3], 8), spread(range(1, 65), 8)
    ([1, 2, 3], [8, 16, 24, 32, 40, 48, 56, 64])
    """
    if len(values) <= most:
        return list(values)
    return [values[(index + 1) * len(values) // most - 1] for index in range(most)]


def trackers_of(report_to: str | Sequence[str] | None) -> list[str]:
    """Return the trackers among those of ``report_to`` that get a table.

    >>> trackers_of(["wandb", "mlflow"]), trackers_of("none")
    (['wandb'], [])
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in _SENDERS if name in names]


def send_samples(
    samples: Sequence[Sample], trackers: Sequence[str], *, step: int, callbacks: Sequence[TrainerCallback]
) -> None:
    """Send samples as a table to trackers whose runs have begun; only the main process may call it.

    Args:
        trackers: as :func:`trackers_of` returns them.
        callbacks: the trainer's callbacks, among them that of TensorBoard, which has its writer.
    """
    for name in trackers:
        _SENDERS[name](samples, step, callbacks)


def table_of(samples: Sequence[Sample], shown: Callable[[str], str] = str) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table; long texts lose their middle.

    Args:
        samples: at least one.
        shown: escapes a cell, on one line already and without control characters, for where it is shown.
    """
    columns = ["question", *samples[0].readouts, "answer", "judged"]
    rows = [
        [each.question, *each.readouts.values(), each.answer, "right" if each.is_right else "wrong"] for each in samples
    ]
    return columns, [[shown(cut(text, most=_LONGEST_CELL)) for text in row] for row in rows]


# transformers imports a tracker only where report_to names it, and so does this file. Each is given the table and, on
# its own axis, the step that transformers' callback gives with scores.


def _send_to_wandb(samples: Sequence[Sample], step: int, callbacks: Sequence[TrainerCallback]) -> None:
    import wandb

    if wandb.run is not None:  # wandb shows cells as plain text
        columns, rows = table_of(samples)
        wandb.log({TABLE: wandb.Table(columns=columns, data=rows), "train/global_step": step})


def _send_to_trackio(samples: Sequence[Sample], step: int, callbacks: Sequence[TrainerCallback]) -> None:
    import trackio

    if trackio.context_vars.current_run.get() is not None:  # trackio renders cells as Markdown
        columns, rows = table_of(samples, markdown)
        trackio.log({TABLE: trackio.Table(columns=columns, data=rows), "train/global_step": step})


def _send_to_tensorboard(samples: Sequence[Sample], step: int, callbacks: Sequence[TrainerCallback]) -> None:
    writers = [each.tb_writer for each in callbacks if isinstance(each, TensorBoardCallback)]
    for writer in filter(None, writers):  # TensorBoard renders texts as Markdown
        columns, rows = table_of(samples, markdown)
        lines = [columns, ["---"] * len(columns), *rows]
        writer.add_text(TABLE, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        writer.flush()


_SENDERS: dict[str, Callable[[Sequence[Sample], int, Sequence[Any]], None]] = {
    "wandb": _send_to_wandb,
    "trackio": _send_to_trackio,
    "tensorboard": _send_to_tensorboard,
}


@contextmanager
def own_wandb_run() -> Iterator[None]:
    """End a wandb run that begins inside, so that each stage has its own, as other trackers give it; not a user's run.

    After an error or a signal it stays open: wandb marks it as failed when the process ends.
    """
    if _wandb_run() is not None:
        yield
        return
    yield
    if _wandb_run() is not None:
        sys.modules["wandb"].finish()


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
