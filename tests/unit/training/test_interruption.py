"""How processes agree on a signal; that a stopped run goes on is tested in integration/."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from rim_peft.training.interruption import SignalWatch


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
