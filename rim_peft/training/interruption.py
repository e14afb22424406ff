"""Stop a training by signal, with a checkpoint to resume from."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - a requested stop, not an error
    """The run was stopped by a signal, after writing what it resumes from.

    Attributes:
        signal_number: the signal, such as ``signal.SIGTERM``.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class SignalWatch:
    """While entered, records the first SIGINT or SIGTERM; a second one acts as usual.

    Args:
        then: what happens next, for the log.
    """

    def __init__(self, then: str = "stopping after this step, with a checkpoint") -> None:
        self._then = then
        self.received: int | None = None  # by this process
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        # Python delivers signals only to the main thread; in another thread they are the caller's business.
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
        logger.warning("%s: %s.", signal.Signals(number).name, self._then)

    def agree(self) -> int | None:
        """Return a signal that any process has received, the same in all, so that they stop at the same step.

        A signal that arrives during the exchange is seen at the next call.
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
    """Ends training after the current step, with a checkpoint, once a signal has arrived."""

    def __init__(self, signals: SignalWatch) -> None:
        self._signals = signals

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if any process has received a signal."""
        if self._signals.agree() is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after an evaluation too, since it may take long."""
        self.on_step_end(args, state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Skip what is due at an epoch's end if a signal stopped the Trainer in the middle of the epoch."""
        if not ends_epoch(state):
            control.should_log = control.should_evaluate = control.should_save = False


class SaveAfterEpoch(TrainerCallback):
    """Delays a checkpoint due at an epoch's last step until the log line and scores of the epoch's end are there.

    The Trainer would save first, and a run resumed from that checkpoint would never have them.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delay a checkpoint that is due."""
        by_epoch = "epoch" in (args.logging_strategy, args.eval_strategy, args.save_strategy)
        self._is_due = control.should_save and by_epoch and ends_epoch(state)
        control.should_save = control.should_save and not self._is_due

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delay one that a signal requests after an evaluation within the step."""
        control.should_save = control.should_save and not self._is_due

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the delayed checkpoint."""
        control.should_save, self._is_due = control.should_save or self._is_due, False


def ends_epoch(state: TrainerState) -> bool:
    """Tell whether the last step was the last one of an epoch, or of the training."""
    return state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()
