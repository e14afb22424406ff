"""Both stages in a row: what is reset between them, what is kept, and how an interrupted run goes on."""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rim_peft.training.grounding_config import GroundingConfig
from rim_peft.training.grounding_trainer import GroundingTrainer
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import ReadoutTrainer, Validate
from rim_peft.training.refinement_config import RefinementConfig
from rim_peft.training.refinement_trainer import RefinementTrainer

SCORE = "accuracy"
"""The name among ``validate``'s scores by which the best adapter is chosen; larger is better."""


class Interrupted(Exception):  # noqa: N818 - a stop that was asked for, not an error
    """The run was stopped by a signal, after writing a checkpoint to resume from.

    Attributes:
        signal_number: the signal, such as ``signal.SIGTERM``.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


@dataclass(frozen=True)
class CurriculumResult:
    """What a run of both stages left behind.

    Attributes:
        history: each stage's log lines, as the Trainer keeps them.
        best: ``stage``, ``step`` and ``accuracy`` of the adapter that was kept; empty without ``validate``.
    """

    history: dict[str, list[dict[str, float]]]
    best: dict[str, Any] = field(default_factory=dict)


def run_curriculum(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    grounding: GroundingConfig | None,
    refinement: RefinementConfig | None,
    eval_dataset: Dataset | None = None,
    validate: Validate | None = None,
    resume: bool = False,
) -> CurriculumResult:
    """Train stage 1, then stage 2 from its weights with optimiser, schedule and random state reset.

    With ``validate``, the adapter's weights at every evaluation and at the end of each stage compete, and the model
    is left with the best ones (the latest among equals). SIGINT and SIGTERM stop the run after the current step, with
    a checkpoint; with ``resume`` it goes on from the last complete checkpoint and ends with the same weights as if it
    had not been stopped (exactly so on a CPU in fp32).

    Args:
        model: the base with its RIM adapter; changed in place.
        tokenizer: the base's tokenizer.
        train_dataset: rows of question, steps and answer for both stages.
        output_dir: where the best weights are kept while training; a stage's checkpoints lie in its own
            ``args.output_dir``.
        grounding: options of stage 1, None to leave it out.
        refinement: options of stage 2, None to leave it out.
        eval_dataset: held-out rows for the evaluation loss.
        validate: scores a model; must return ``accuracy``.
        resume: go on where a run with the same arguments was stopped.

    Raises:
        Interrupted: a signal asked the run to stop.
    """
    stages: list[tuple[type[ReadoutTrainer], ReadoutConfig]] = []
    if grounding is not None:
        stages.append((GroundingTrainer, grounding))
    if refinement is not None:
        stages.append((RefinementTrainer, refinement))
    best = _BestWeights(Path(output_dir) / "best.safetensors")
    history: dict[str, list[dict[str, float]]] = {}
    with _SignalWatch() as signals:
        for trainer_class, args in stages:
            stage = trainer_class.__name__.removesuffix("Trainer").lower()
            folder = Path(str(args.output_dir))
            finished = folder / "final.safetensors"
            if resume and finished.exists():
                _load_weights(model, finished)
                history[stage] = json.loads((folder / "history.json").read_text())
                continue
            set_seed(args.seed)
            trainer = trainer_class(
                model,
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset if args.eval_strategy != "no" else None,
                processing_class=tokenizer,
                validate=validate,
                callbacks=[_StopOnSignal(signals), _KeepBest(best, stage)],
            )
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if resume else None)
            if signals.received is not None:
                raise Interrupted(signals.received)
            if validate is not None:
                _compete_at_end(trainer, best, stage, validate)
            history[stage] = trainer.state.log_history
            # The history first: the weights' file marks the stage as finished.
            _write_text(folder / "history.json", json.dumps(history[stage]))
            _save_weights(model, finished, {})
    if validate is not None and best.path.exists():
        _load_weights(model, best.path)
        return CurriculumResult(history, best.read())
    return CurriculumResult(history)


class _SignalWatch:
    """While entered, remembers the first SIGINT or SIGTERM; the second one acts as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _SignalWatch:
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

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class _StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once a signal has come."""

    def __init__(self, signals: _SignalWatch) -> None:
        self._signals = signals

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._signals.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)


class _BestWeights:
    """The best adapter so far and its score, in one file that is replaced at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return stage, step and score of the weights in the file."""
        with safe_open(self.path, framework="pt") as file:
            return json.loads(file.metadata()["best"])

    def offer(self, model: PeftModel, score: float, *, stage: str, step: int) -> None:
        """Keep the model's adapter if it is at least as good as the one in the file."""
        if not self.path.exists() or score >= self.read()[SCORE]:
            _save_weights(model, self.path, {"best": json.dumps({"stage": stage, "step": step, SCORE: score})})


class _KeepBest(TrainerCallback):
    """Offers the weights at every evaluation."""

    def __init__(self, best: _BestWeights, stage: str) -> None:
        self._best = best
        self._stage = stage

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        score = kwargs["metrics"].get(f"eval_{SCORE}")
        if score is not None and state.is_world_process_zero:
            self._best.offer(kwargs["model"], score, stage=self._stage, step=state.global_step)


def _compete_at_end(trainer: ReadoutTrainer, best: _BestWeights, stage: str, validate: Validate) -> None:
    """Offer a stage's last weights, and log their scores, unless its last step has been evaluated already."""
    step = trainer.state.global_step
    logged = [line for line in trainer.state.log_history if f"eval_{SCORE}" in line]
    if logged and logged[-1]["step"] == step:
        return
    trainer.model.eval()
    scores = validate(trainer.model)
    trainer.log({f"eval_{name}": value for name, value in scores.items()})
    if trainer.is_world_process_zero():
        best.offer(trainer.model, scores[SCORE], stage=stage, step=step)


def _last_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint that was written to its end, None if there is none."""
    checkpoints = sorted(
        Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    for checkpoint in reversed(checkpoints):
        try:
            # The Trainer writes this file last, so a checkpoint cut off by a kill lacks it or holds half of it.
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def _save_weights(model: PeftModel, path: Path, metadata: dict[str, str]) -> None:
    """Write the active adapter's tensors to one file, at once."""
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"format": "pt", **metadata})
    temporary.replace(path)


def _load_weights(model: PeftModel, path: Path) -> None:
    """Read what :func:`_save_weights` wrote into the active adapter."""
    set_peft_model_state_dict(model, load_file(path), adapter_name=model.active_adapter)


def _write_text(path: Path, text: str) -> None:
    """Write a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
