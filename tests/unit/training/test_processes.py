"""What one process does before the others, and how they agree on a signal; more in integration/test_processes.py."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rim_peft.training.distributed import check_resumed, is_main, main_first, num_processes, on_main, shards_weights
from rim_peft.training.interruption import SignalWatch


def _fail() -> None:
    raise ValueError("bad rows")


def test_one_process_does_everything_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    assert (num_processes(), is_main(), shards_weights()) == (1, True, False)
    calls: list[int] = []
    assert on_main(lambda: calls.append(1) or len(calls)) == 1
    assert main_first(lambda: calls.append(2) or len(calls)) == 2
    assert calls == [1, 2]
    for share in (on_main, main_first):
        with pytest.raises(ValueError, match="bad rows"):
            share(_fail)


def test_a_launcher_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (num_processes(), is_main(), shards_weights()) == (4, False, True)


def test_processes_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # and nothing that the processes could find each other by
    with pytest.raises(RuntimeError, match=r"processes: 2 were started, but .* no GPUs .*ACCELERATE_USE_CPU=true"):
        on_main(lambda: None)


def test_as_many_processes_must_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "rng_state.pth").touch()
    check_resumed(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"resume: needs as many processes as wrote .*, 1, got 2, .* Start 1\."):
        check_resumed(tmp_path)
    (tmp_path / "rng_state.pth").unlink()
    for rank in (0, 1):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    check_resumed(tmp_path)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="2, got 1"):
        check_resumed(tmp_path)


def test_a_signal_that_comes_while_processes_ask_each_other_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = SignalWatch()
    answers: list[list[int | None]] = []

    def all_gather_object(received: list[int | None], own: int | None) -> None:
        received[:] = [None, own]
        answers.append(received)
        signals.received = signal.SIGTERM

    distributed: Any = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", all_gather_object)
    assert signals.agree() is None  # as the other process, which stops at the same step
    assert signals.agree() == signal.SIGTERM
    assert answers == [[None, None], [None, signal.SIGTERM]]
