"""Train stages in sequence: what is reset between them, what is kept, and how an interrupted run resumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, set_seed

from rim_peft.training.checkpoints import (
    FINAL,
    HISTORY,
    MOMENTS,
    SCORE,
    BestWeights,
    check_folders,
    last_checkpoint,
    load_weights,
    mark_finished,
    offered,
    read_finished,
    read_log,
)
from rim_peft.training.distributed import check_resumed, fill_optimizer, on_main, run_whole
from rim_peft.training.files import explain_write_errors, hold
from rim_peft.training.interruption import Interrupted, SignalWatch, StopOnSignal
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.training.rim import GroundingConfig, GroundingTrainer, RefinementConfig, RefinementTrainer
from rim_peft.training.samples import ReadSamples, own_wandb_run
from rim_peft.training.watching import Validate
from rim_peft.tuner.config import active_config

__all__ = ["CurriculumResult", "Interrupted", "run_curriculum", "run_stages"]


@dataclass(frozen=True)
class CurriculumResult:
    """Result of a run of both stages.

    Attributes:
        history: each stage's log lines, as the Trainer keeps them.
        best: ``stage``, ``step`` and ``accuracy`` of the best adapter; empty without ``validate``.
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

    With ``validate``, the adapter's weights compete at every evaluation and at the end of each stage, and the model
    ends with the best ones (the latest among equals). SIGINT and SIGTERM stop the run after the current step, with
    a checkpoint; with ``resume`` it continues from the last complete checkpoint and ends with the same weights as
    without the stop (exactly the same on a CPU in fp32). A stream of rows is repeated, as one long pass.

    Under a launcher every process makes the same call and ends with the same weights; the main process writes. Under
    FSDP the model stays sharded.

    Args:
        model: the base with its RIM adapter; changed in place.
        train_dataset: rows of question, steps and answer for both stages.
        output_dir: folder of the best weights during training; each stage's checkpoints are in its own
            ``args.output_dir``.
        grounding: options of stage 1; None to skip it.
        refinement: options of stage 2; None to skip it.
        eval_dataset: held-out rows for the evaluation loss.
        validate: scores a model; must return ``accuracy``.
        resume: continue a stopped run with the same arguments.

    Raises:
        Interrupted: a signal stopped the run.
        ValueError: the folders hold another run's work and ``resume`` is not set; checkpoints would lack what
            resuming needs; or ``validate`` returns no ``accuracy``.
    """
    both: list[tuple[type[ReadoutTrainer], ReadoutConfig | None]] = [
        (GroundingTrainer, grounding),
        (RefinementTrainer, refinement),
    ]
    stages = [(trainer_class, args) for trainer_class, args in both if args is not None]
    return run_stages(
        model,
        tokenizer,
        stages,
        train_dataset=train_dataset,
        output_dir=output_dir,
        eval_dataset=eval_dataset,
        validate=validate,
        resume=resume,
    )


def run_stages(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stages: Sequence[tuple[type[ReadoutTrainer], ReadoutConfig]],
    *,
    train_dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    eval_dataset: Dataset | None = None,
    validate: Validate | None = None,
    read_samples: ReadSamples | None = None,
    resume: bool = False,
) -> CurriculumResult:
    """Train any stages in sequence; see :func:`run_curriculum` and the trainers for the other arguments."""
    check_stages(stages)
    names = [trainer_class.__name__.removesuffix("Trainer").lower() for trainer_class, _ in stages]
    best = BestWeights(Path(output_dir) / "best.safetensors", names)
    folders = [best.path.parent, *(Path(str(args.output_dir)) for _, args in stages)]
    on_main(lambda: check_folders(folders, resume=resume))
    if isinstance(train_dataset, IterableDataset):
        train_dataset = train_dataset.repeat(None)  # the Trainer can resume only within one pass
    tuner: Any = model.base_model
    own_dropout = active_config(model).lora_dropout
    history: dict[str, list[dict[str, float]]] = {}
    moments: Path | None = None  # of the previous stage, if the next one continues with them
    with hold(best.path.parent), explain_write_errors(best.path.parent), SignalWatch() as signals:
        if not resume:
            on_main(best.begin)
        for index, (stage, (trainer_class, args)) in enumerate(zip(names, stages, strict=True)):
            folder = Path(str(args.output_dir))
            before, moments = moments, folder / MOMENTS if _keeps_optimizer(stages[index + 1 :]) else None
            left = [FINAL, HISTORY, *([MOMENTS] if moments is not None else [])]
            if resume and (lines := on_main(partial(read_finished, folder, left))) is not None:
                load_weights(model, folder / FINAL)
                history[stage] = lines
                continue
            set_seed(args.seed)
            tuner.set_dropout(own_dropout)  # the previous stage may have set another
            trainer = trainer_class(
                model,
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset if args.eval_strategy != "no" else None,
                processing_class=tokenizer,
                validate=validate,
                read_samples=read_samples,
                callbacks=[StopOnSignal(signals), *([_KeepBest(best, stage)] if validate is not None else [])],
            )
            with own_wandb_run():
                _train_stage(trainer, best, history, signals, validate, before=before, left=left, resume=resume)
    tuner.set_dropout(own_dropout)
    if validate is not None and best.path.exists():
        on_main(partial(best.check, offered(history), at=(names[-1], math.inf)))
        return CurriculumResult(history, best.load(model))
    return CurriculumResult(history)


def _train_stage(
    trainer: ReadoutTrainer,
    best: BestWeights,
    history: dict[str, list[dict[str, float]]],
    signals: SignalWatch,
    validate: Validate | None,
    *,
    before: Path | None,
    left: Sequence[str],
    resume: bool,
) -> None:
    """Train one stage, from its last checkpoint if there is one to resume from, and write its files.

    Args:
        history: log lines of the stages before; gets this stage's.
        before: the previous stage's moments, if this one continues with them.
        left: names of the files that the finished stage leaves.

    Raises:
        Interrupted: a signal stopped it.
    """
    stage, folder = trainer.stage_name, Path(str(trainer.args.output_dir))
    checkpoint = on_main(partial(last_checkpoint, folder)) if resume else None
    if checkpoint is not None:
        check_resumed(checkpoint)
    if resume and validate is not None:
        log, step = read_log(checkpoint)
        on_main(partial(best.check, offered({**history, stage: log}), at=(stage, step)))
    if before is not None and checkpoint is None:
        trainer.add_callback(_GoOnWith(before))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if (received := signals.agree()) is not None:
        raise Interrupted(received)
    if validate is not None:
        _compete_at_end(trainer, best, stage, validate)
    history[stage] = trainer.state.log_history
    mark_finished(folder, left, trainer.model, trainer.optimizer, trainer.state.log_history)
    trainer.release()
    if (received := signals.agree()) is not None:  # received while the last weights were scored
        raise Interrupted(received)


def _keeps_optimizer(following: Sequence[tuple[type[ReadoutTrainer], ReadoutConfig]]) -> bool:
    """Whether the first of these stages continues with the previous stage's optimiser."""
    args = following[0][1] if following else None
    return isinstance(args, RefinementConfig) and not args.reset_optimizer


def check_stages(stages: Sequence[tuple[type[ReadoutTrainer], ReadoutConfig]]) -> None:
    """Check that stages fit together and can be resumed.

    Raises:
        ValueError: checkpoints would lack what resuming needs, or a stage would continue with an optimiser that does
            not exist or is of another kind.
    """
    if any(args.save_only_model for _, args in stages):
        raise ValueError("save_only_model: must be False, since resuming needs the optimiser's state too. Remove it.")
    for index, (_, args) in enumerate(stages):
        if _keeps_optimizer(stages[index:]):
            before = stages[index - 1][1] if index else None
            if before is None or before.optim != args.optim:
                raise ValueError(
                    f"reset_optimizer: must be True unless the previous stage has the same optimiser, got False with "
                    f"optim {args.optim} after {before.optim if before else 'no stage'}. Omit it, or give both "
                    "stages the same optim."
                )
            if (before.loraplus_lr_ratio is None) != (args.loraplus_lr_ratio is None):  # another order of parameters
                raise ValueError(
                    "reset_optimizer: must be True if only one stage has loraplus_lr_ratio, got False with "
                    f"{before.loraplus_lr_ratio} and {args.loraplus_lr_ratio}. Omit it, or give both stages one."
                )


class _GoOnWith(TrainerCallback):
    """Gives a stage's new optimiser the previous stage's moments; rates and decay stay the stage's own."""

    def __init__(self, moments: Path) -> None:
        self._moments = moments

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        kept = torch.load(self._moments, map_location="cpu", weights_only=True)
        fill_optimizer(optimizer, {**optimizer.state_dict(), "state": kept["state"]})


class _KeepBest(TrainerCallback):
    """Offers the weights at every evaluation."""

    def __init__(self, best: BestWeights, stage: str) -> None:
        self._best = best
        self._stage = stage

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        score = kwargs["metrics"].get(f"eval_{SCORE}")
        if score is None:
            raise ValueError(
                f"validate: must return a score named {SCORE!r}, which chooses the best adapter, got none. Add it."
            )
        self._best.offer(kwargs["model"], score, stage=self._stage, step=state.global_step)


def _compete_at_end(trainer: ReadoutTrainer, best: BestWeights, stage: str, validate: Validate) -> None:
    """Score, log and offer a stage's last weights, unless its last step has been evaluated already."""
    step = trainer.state.global_step
    logged = [line for line in trainer.state.log_history if f"eval_{SCORE}" in line]
    if logged and logged[-1]["step"] == step:
        return
    trainer.check_finite()
    trainer.model.eval()
    scores = run_whole(trainer.model, validate)
    metrics = {f"eval_{name}": value for name, value in scores.items()}
    trainer.log(metrics)
    _KeepBest(best, stage).on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics=metrics, model=trainer.model
    )
    trainer.show_samples()
