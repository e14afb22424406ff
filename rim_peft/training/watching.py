"""Monitor a training: log lines, evaluations, checks for finite values, and the part of them that checkpoints keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from rim_peft.training.display import ReadoutProgress
from rim_peft.training.distributed import run_whole
from rim_peft.training.finite import DivergedError, LossWatch, check_logged, check_weights, diverged_part
from rim_peft.training.metrics import BlockMetrics, Metrics, TrainingClock
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.samples import ReadSamples, send_samples, trackers_of
from rim_peft.training.trl_plugin import PluggedTrainer

Validate = Callable[[PeftModel], dict[str, float]]
"""Returns the scores of a model in evaluation mode by name, for example ``{"accuracy": 0.5}``."""


class WatchedTrainer(PluggedTrainer):
    """The part of :class:`~rim_peft.training.readout_trainer.ReadoutTrainer` that logs and evaluates.

    No step reads a number from the device: losses are checked on it, and read only for a log line, a checkpoint or an
    evaluation.
    """

    args: ReadoutConfig
    metrics_class: type[Metrics] = BlockMetrics
    own_states = ("_GoOn", "TrainingClock")

    def __init__(
        self, *args: Any, validate: Validate | None = None, read_samples: ReadSamples | None = None, **kwargs: Any
    ) -> None:
        self._validate = validate
        self._read_samples = read_samples
        self._progress = ReadoutProgress(self.stage_name)
        self._sums = {"train": self.metrics_class(), "eval": self.metrics_class()}
        self._clock = TrainingClock()
        self._new_tokens = 0  # of this process, since the last log line
        self._num_samples: int | Tensor = 0  # of all processes, on the device after a step
        self._losses = LossWatch()
        super().__init__(*args, **kwargs)
        self.add_callback(self._clock)
        self.add_callback(_GoOn(self))
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self._progress)

    @property
    def stage_name(self) -> str:
        """The training's name in logs, files and errors."""
        return type(self).__name__.removesuffix("Trainer").lower()

    def figures(self, mode: str) -> dict[str, float]:
        """Return a log line's figures besides the loss, over all processes and since the last line.

        Args:
            mode: ``"train"`` or ``"eval"``.
        """
        return self._sums[mode].read(self.accelerator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the progress bar is gone, also if the training was stopped."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._progress.close()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimiser step, and their number of samples in all processes."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._num_samples = self._num_samples + count
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward."""
        loss = super().training_step(*args, **kwargs)
        self._losses.add(loss, step=self.state.global_step + 1)
        return loss

    def check_finite(self) -> None:
        """Check that all losses so far and the weights are finite; every process must call it.

        Raises:
            DivergedError: they are not; says since which step.
        """
        if (first := self._losses.first(self.accelerator)) is not None:
            raise DivergedError(self.stage_name, f"the loss of step {first[0]} is {first[1]}")
        check_weights(self.model, self.accelerator, stage=self.stage_name, step=self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a line with a loss also gets each block's figures since the last one, and the tokens trained on so far.

        Raises:
            DivergedError: a loss, the gradient norm or a weight is not finite.
        """
        # Lines with a loss are the Trainer's own, logged by every process; others may come from only one process.
        loss = next((name for name in logs if name == "loss" or name.endswith("_loss")), None)
        if loss is not None:
            self.check_finite()
            may_skip = self.accelerator.scaler is not None or self.is_deepspeed_enabled
            check_logged(logs, stage=self.stage_name, step=self.state.global_step, may_skip=may_skip)
            # Each of several sets of evaluation rows has names of its own, such as eval_hard_loss.
            mode, prefix = ("train", "") if self.model.training else ("eval", loss.removesuffix("loss"))
            figures = self.figures(mode)
            logs["num_tokens"] = self._count_tokens()
            logs["train_seconds"] = round(self._clock.seconds, 3)
            if isinstance(self.train_dataset, Dataset):
                logs["num_samples"] = int(self._num_samples)
            logs.update({f"{prefix}{name}": value for name, value in figures.items()})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; if the model is sharded, every process must call it.

        Raises:
            DivergedError: it is not finite.
        """
        if (found := diverged_part(self.model)) is not None:  # this process only: others may not call it
            raise DivergedError(self.stage_name, f"of the weights after step {self.state.global_step} {found}")
        super().save_model(output_dir, _internal_call)

    def _count_tokens(self) -> int:
        """Return the tokens of the rows trained on so far, in all processes; every process must call it."""
        new = torch.tensor(self._new_tokens, device=self.args.device)
        # The state is part of a checkpoint, so a resumed run continues the count.
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(new, reduction="sum"))
        self._new_tokens = 0
        return self.state.num_input_tokens_seen

    def before_checkpoint(self) -> None:
        """Check the weights, and put the sums so far into the state that is about to be saved."""
        self.check_finite()
        self._count_tokens()
        self._clock.keep(self.state)
        kept: Any = self.state.stateful_callbacks
        kept[_GoOn.__name__] = {"args": {}, "attributes": self.running()}

    def after_loading(self, checkpoint: str) -> None:
        """Check the weights.

        Raises:
            ValueError: one is not finite.
        """
        if (found := diverged_part(self.model)) is not None:
            raise ValueError(
                f"{checkpoint}: must hold finite weights to resume from, {found}: the training had diverged. Delete it "
                "to resume from the previous checkpoint, or train again in another output_dir."
            )

    def running(self) -> dict[str, Any]:
        """Return the sums for the next log line, for each process, and those of the whole training."""
        figures = self._sums["train"].running(self.accelerator)
        return {**self.loss_so_far(), "figures": figures, "num_samples": int(self._num_samples)}

    def go_on(self, running: dict[str, Any] | None) -> None:
        """Begin a training or, with the result of :meth:`running`, continue one."""
        self._losses = LossWatch()
        num_rows = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else 0
        # A checkpoint of an earlier version does not say it; an epoch's batches have about equal numbers.
        self._num_samples = (running or {}).get("num_samples", round((self.state.epoch or 0.0) * num_rows))
        if running is None:  # from the start, or from a checkpoint of an earlier version
            return
        self.continue_loss(running)
        process, device = self.accelerator.process_index, self.args.device
        self._sums["train"].go_on(running["figures"], process=process, device=device)

    def seconds_before(self) -> float:
        """Return the seconds that the training took before it was resumed."""
        return self._clock.before

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add the scores of ``validate`` to the evaluation's metrics.

        Raises:
            DivergedError: the weights are not finite.
            ValueError: the metric that chooses the best checkpoint is not finite.
        """
        self.check_finite()
        output = super().evaluation_loop(*args, **kwargs)
        if self._validate is not None:
            self.model.eval()
            scores = run_whole(self.accelerator.unwrap_model(self.model), self._validate)
            prefix = kwargs.get("metric_key_prefix", "eval")
            metrics = dict(output.metrics or {})
            metrics.update({f"{prefix}_{name}": value for name, value in scores.items()})
            output = output._replace(metrics=metrics)
        self._check_metric(output.metrics or {})
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, then show sample readouts."""
        metrics = super().evaluate(*args, **kwargs)
        if kwargs.get("metric_key_prefix", "eval") == "eval":  # once for several sets of rows
            self.show_samples()
        return metrics

    def show_samples(self) -> None:
        """Read samples and show them in trackers and in the terminal; every process must call it."""
        trackers = trackers_of(self.args.report_to)
        in_terminal = self._progress.is_live and self.accelerator.num_processes == 1
        if self._read_samples is None or not (trackers or in_terminal):
            return
        self.model.eval()
        samples = run_whole(self.accelerator.unwrap_model(self.model), self._read_samples)
        if samples and self.is_world_process_zero():
            callbacks = self.callback_handler.callbacks
            send_samples(samples, trackers, step=self.state.global_step, callbacks=callbacks)
            self._progress.show_samples(samples)

    def _check_metric(self, metrics: dict[str, float]) -> None:
        """Refuse a metric that is not finite, since nothing might ever be better."""
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        value = metrics.get(name, 0.0)
        if isinstance(value, int | float) and not math.isfinite(value):
            raise ValueError(
                f"metric_for_best_model: {name} must be finite, since it chooses the best checkpoint, got {value} at "
                f"step {self.state.global_step}. Correct what validate returns, or choose by another metric."
            )


class _GoOn(TrainerCallback):
    """Restores the sums from a checkpoint when a training begins, after the Trainer has set them to zero."""

    def __init__(self, trainer: WatchedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept: Any = state.stateful_callbacks
        part = kept.get(type(self).__name__)
        self._trainer.go_on(part["attributes"] if part else None)
        best = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():  # the Trainer drops it if the folder was moved
            state.best_model_checkpoint = str(best)
