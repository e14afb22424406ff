"""The terminal while a training runs, as somebody would see it."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState

from rim_peft.training.display import ReadoutProgress, format_log, table_lines
from rim_peft.training.samples import Sample

LOGS = {
    "loss": 1.5,
    "longest_chain": 2.0,
    "num_layers": 4.0,
    **{f"loss_by_block/{block}": 0.5 * block for block in (1, 2)},
    **{f"token_accuracy_by_block/{block}": 1.0 / block for block in (1, 2)},
    **{f"weight_by_block/{block}": 1.0 for block in (1, 2)},
}
SAMPLES = [
    Sample("Tom's brew?", {"block 1": "plum", "block 2": "blue"}, answer="blue", is_right=True),
    Sample("Ann's\nbrew?\x1b[31m", {"block 1": "red", "block 2": "red"}, answer="green", is_right=False),
]


class Terminal(io.StringIO):
    """A terminal that understands what tqdm writes."""

    patch: pytest.MonkeyPatch
    progress: ReadoutProgress

    def __init__(self) -> None:
        super().__init__()
        self._is_terminal = True
        self._ends = pty.openpty()  # has the size
        self.resize(columns=101, lines=40)

    def resize(self, *, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ends[1], termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def fileno(self) -> int:
        return self._ends[1]

    def release(self) -> None:
        for end in self._ends:
            os.close(end)

    def isatty(self) -> bool:
        return self._is_terminal

    def screen(self) -> list[str]:
        lines: dict[int, str] = {}
        row = column = 0
        for part in re.findall(r"\x1b\[A|.|\n", self.getvalue(), re.DOTALL):
            if part == "\n":
                row, column = row + 1, 0
            elif part == "\r":
                column = 0
            elif part == "\x1b[A":
                row -= 1
            else:
                line = lines.get(row, "").ljust(column)
                lines[row] = line[:column] + part + line[column + 1 :]
                column += 1
        assert min(lines) >= 0
        return [lines.get(row, "").rstrip() for row in range(max(lines) + 1)]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    shown.patch = monkeypatch
    yield shown
    shown.progress.close()
    shown.release()


def begin(progress: ReadoutProgress, terminal: Terminal, **state: Any) -> tuple[Any, TrainerState, TrainerControl]:
    for stream in ("stderr", "stdout"):  # in the test itself: pytest sets them again after a fixture
        terminal.patch.setattr(sys, stream, terminal)
    terminal.progress = progress
    given: tuple[Any, TrainerState, TrainerControl] = (
        SimpleNamespace(),
        TrainerState(max_steps=300, is_world_process_zero=state.pop("is_main", True), **state),
        TrainerControl(),
    )
    progress.on_train_begin(*given)
    return given


def test_table_and_samples_are_below_the_bar_and_lines_above(terminal: Terminal) -> None:
    progress = ReadoutProgress("grounding")
    given = begin(progress, terminal)
    progress.on_log(*given, logs={**LOGS, "loss": 9.0})
    given[1].global_step = 20
    progress.on_step_end(*given)
    progress.on_log(*given, logs={"eval_loss": 2.0, "eval_accuracy": 0.25, "eval_loss_by_block/1": 7.0})
    progress.on_log(*given, logs=LOGS)
    progress.show_samples(SAMPLES)
    lines = terminal.screen()
    assert lines[:3] == [
        "step 0/300  longest_chain 2  loss 9  token accuracy by block 1.00 0.50",
        "step 20/300  eval_loss 2  eval_accuracy 0.25",
        "step 20/300  longest_chain 2  loss 1.5  token accuracy by block 1.00 0.50",
    ]
    assert re.match(r" *7%\|.*\| 20/300 \[", lines[3])
    assert lines[4:] == [
        "grounding  loss 1.5  longest chain 2  layers 4  validation loss 2  validation accuracy 0.25",
        "block      loss  token accuracy              weight",
        "    1    0.5000  1.00 ####################  1.00",
        "    2    1.0000  0.50 ##########..........  1.00",
        "right  Tom's brew?: plum | blue",
        "wrong  Ann's brew?\\x1b[31m: red | red  (answer green)",
    ]


def test_bars_of_others_and_log_messages_do_not_disturb_the_table(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(terminal)])
    before = root.handlers
    progress = ReadoutProgress("grounding")
    given = begin(progress, terminal)
    progress.on_log(*given, logs=LOGS)
    with tqdm(total=3, desc="other", leave=False) as other:
        other.update(1)
        logging.getLogger("rim_peft").warning("SIGTERM: stopping")
        assert terminal.screen()[-1].startswith("other:  33%")
    progress.on_log(*given, logs=LOGS)
    lines = terminal.screen()
    assert lines[1] == "SIGTERM: stopping"
    assert lines[3].startswith("  0%|")
    assert len([line for line in lines if line.startswith("grounding")]) == 1
    progress.close()
    assert root.handlers is before
    left = [line for line in terminal.screen() if line]
    assert len(left) == 4  # two log lines, the message, the bar
    assert left[3].startswith("  0%|")
    progress.close()  # again: nothing


def test_a_table_is_as_large_as_fits(terminal: Terminal) -> None:
    terminal.resize(columns=31, lines=7)
    progress = ReadoutProgress("grounding")
    given = begin(progress, terminal)
    progress.on_log(*given, logs={"loss": 1.0, **{f"loss_by_block/{block}": 1.0 for block in range(1, 65)}})
    progress.show_samples(SAMPLES)
    bar, *table = terminal.screen()[1:]
    assert bar.startswith("  0%|")
    assert len(table) <= 6
    assert "more hidden" in table[-1]
    assert max(map(len, table)) <= 30


def test_many_blocks_are_shown_at_equal_distances() -> None:
    lines = table_lines({f"loss_by_block/{block}": 1.0 for block in range(1, 65)}, stage="refinement")
    assert [int(line.split()[0]) for line in lines[2:]][-2:] == [58, 64]
    assert len(lines) == 14


@pytest.mark.parametrize("how", ["file", "dumb terminal", "another process"])
def test_elsewhere_there_are_lines_alone(how: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "file":
        terminal._is_terminal = False
    if how == "dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    progress = ReadoutProgress("grounding")
    given = begin(progress, terminal, is_main=how != "another process")
    progress.on_log(*given, logs=LOGS)
    progress.show_samples(SAMPLES)
    assert not progress.is_live
    shown = terminal.getvalue()
    assert ("step 0/300  longest_chain 2  loss 1.5" in shown) == (how != "another process")
    assert "\x1b" not in shown
    assert "plum" not in shown
    progress.close()


def test_texts_that_a_terminal_cannot_encode_are_escaped(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "encoding", "ascii", raising=False)
    progress = ReadoutProgress("grounding")
    given = begin(progress, terminal)
    progress.show_samples([Sample("café?", {"block 1": "ja"}, answer="ja", is_right=True)])
    assert "right  caf\\xe9?: ja" in terminal.screen()
    progress.on_train_end(*given)


def test_a_log_line_of_an_evaluation_and_of_earlier_versions() -> None:
    eval_line = {"eval_loss": 1.0, "eval_token_accuracy_by_block/2": 0.5, "eval_token_accuracy_by_block/10": 0.25}
    assert format_log(eval_line, step=1, max_steps=2) == "step 1/2  eval_loss 1  token accuracy by block 0.50 0.25"
    old = {"loss": 1.0, "block_1/token_accuracy": 0.5, "block_2/token_accuracy": 1.0}
    assert format_log(old, step=1, max_steps=2) == "step 1/2  loss 1  token accuracy by block 0.50 1.00"
