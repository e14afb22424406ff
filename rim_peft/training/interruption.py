"""Stopping a training from outside: signals, and the checkpoint they leave."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - a stop that was asked for, not an error
    """The run was stopped by a signal, after writing a checkpoint to resume from.

    Attributes:
        signal_number: the signal, such as ``signal.SIGTERM``.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class SignalWatch:
    """While entered, remembers the first SIGINT or SIGTERM; the second one acts as usual."""

    def __init__(self) -> None:
        self.received: int | None = None  # by this process
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        # Python delivers signals to the main thread alone; elsewhere the caller has them in hand.
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        logger.warning("%s: stopping after this step, with a checkpoint.", signal.Signals(number).name)

    def agree(self) -> int | None:
        """Return a signal that some process has received, the same in all, so that they stop at the same step.

        One that comes while they ask each other waits for the next time.
        """
        received = [self.received]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            received = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(received, self.received)
        return next((number for number in received if number is not None), None)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once a signal has come."""

    def __init__(self, signals: SignalWatch) -> None:
        self._signals = signals

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if a signal has come to any process."""
        if self._signals.agree() is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after an evaluation too, which may have taken long."""
        self.on_step_end(args, state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do nothing of what the end of an epoch brings where a signal has stopped the Trainer within one."""
        if not ends_epoch(state):
            control.should_log = control.should_evaluate = control.should_save = False


class SaveAfterEpoch(TrainerCallback):
    """Lets a checkpoint wait that is due at an epoch's last step, if the epoch's end brings a log line or a score.

    The Trainer would save first: what resumes from there would never see them.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put off a checkpoint."""
        by_epoch = "epoch" in (args.logging_strategy, args.eval_strategy, args.save_strategy)
        self._is_due = control.should_save and by_epoch and ends_epoch(state)
        control.should_save = control.should_save and not self._is_due

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put off one that a signal asks for after a score within the step."""
        control.should_save = control.should_save and not self._is_due

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save what was put off."""
        control.should_save, self._is_due = control.should_save or self._is_due, False


def ends_epoch(state: TrainerState) -> bool:
    """Tell whether the last step was the last one of an epoch, or of the training."""
    return state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()
