"""Short chains first: the part of a readout trainer that draws rows by their number of steps (``length_shares``)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from datasets import Dataset
from torch import Tensor

from rim_peft.data.batching import LengthCurriculum, Pace, order_by_length
from rim_peft.data.objective import Objective
from rim_peft.training.metrics import by_block
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.watching import WatchedTrainer
from rim_peft.tuner.layers import lowest_layers


class ShortFirstTrainer(WatchedTrainer, ABC):
    """The curriculum by length of :class:`~rim_peft.training.readout_trainer.ReadoutTrainer`.

    See :func:`~rim_peft.data.batching.order_by_length` for the order; without ``length_shares`` nothing changes.
    """

    model: Any  # a PeftModel; the parent declares more types
    args: ReadoutConfig
    _window = 0  # the first step that the next log line covers

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """The stage's objective."""

    def check_rows(self) -> None:
        """Refuse a stream of rows, whose lengths are unknown.

        Raises:
            ValueError: the rows are a stream, but their lengths are needed.
        """
        if self.args.length_shares is not None and not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                "length_shares: needs the rows' lengths, which a stream does not have. Give a Dataset, or omit "
                "length_shares."
            )

    def longest_chain(self, step: int) -> int | None:
        """Return the most steps of a row that a training step may draw; None for any number."""
        return None if self.args.length_shares is None else self.lengths.most_steps(step)

    def row_order(self) -> Any:
        """Return the sampler of training rows; with ``length_shares`` short chains come first."""
        return super().row_order() if self.args.length_shares is None else self.lengths

    @cached_property
    def lengths(self) -> LengthCurriculum:
        """The order of rows in a curriculum by length."""
        args: Any = self.args
        rows: Any = self.train_dataset
        pace = Pace.of(args, len(rows), num_processes=self.accelerator.num_processes)
        seed = args.seed if args.data_seed is None else args.data_seed
        return order_by_length(rows, args.length_shares, pace, seed=seed)

    def before_epoch(self, epoch: int) -> None:
        """Tell the order of rows; when several processes resume, it is nested too deep in their loader to be told."""
        if self.args.length_shares is not None:
            self.lengths.set_epoch(epoch)

    def figures(self, mode: str) -> dict[str, float]:
        """Return a log line's figures besides the loss; starts the next phase early once short chains are learned."""
        figures = super().figures(mode)
        if mode != "train" or self.args.length_shares is None:
            return figures
        step = self.state.global_step
        first, last = self._window, max(0, step - 1)
        self._window = step
        longest = self.longest_chain(last)
        if longest is None:
            return figures
        if self.lengths.phase_at(first) == self.lengths.phase_at(last) and self._has_learned(figures, longest):
            # Batches are drawn ahead of training: one by accelerate, more by worker processes.
            drawn = 1 + self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)
            self.lengths.advance(last, step + 1 + math.ceil(drawn / self.args.gradient_accumulation_steps))
        figures = {**figures, "longest_chain": float(longest)}
        return figures if self.args.layer_shares is None else {**figures, "num_layers": float(self._num_layers(last))}

    def _num_layers(self, step: int) -> int:
        """Return how many of the base's layers a training step runs."""
        num_layers: int = self.model.config.get_text_config().num_hidden_layers
        longest = self.lengths.most_steps(step)
        return num_layers if longest is None else self.args.num_layers(longest, num_layers)

    def _has_learned(self, figures: Mapping[str, float], longest: int) -> bool:
        """Tell whether the last block's readouts reach ``length_accuracy`` on the current chains."""
        last = self.objective.last_block(longest)
        accuracies = [value for block, value in by_block(figures, "token_accuracy").items() if block <= last]
        accuracy = accuracies[-1] if accuracies else 0.0
        return self.args.length_accuracy is not None and accuracy >= self.args.length_accuracy

    def running(self) -> dict[str, Any]:
        """Return what a log line sums up, and when the phases of a curriculum by length began."""
        running = super().running()
        return running if self.args.length_shares is None else {**running, "lengths": self.lengths.begins}

    def go_on(self, running: dict[str, Any] | None) -> None:
        """Begin a training or, with the result of :meth:`running`, continue one."""
        super().go_on(running)
        running = running or {}
        self._window = running.get("last_logged", 0)
        if self.args.length_shares is not None:
            self.lengths.begins = list(running.get("lengths", self.lengths.planned))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward, through the lowest layers alone if ``layer_shares`` says so."""
        # Around backward too: gradient checkpointing runs the layers again there.
        with self._depth():
            return super().training_step(*args, **kwargs)

    def _depth(self) -> AbstractContextManager[None]:
        if self.args.layer_shares is None:
            return nullcontext()
        return lowest_layers(self.model.get_base_model(), self._num_layers(self.state.global_step))
