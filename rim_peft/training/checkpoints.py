"""What a checkpoint holds: the same files whether one process trained, or several with a part of the weights each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from rim_peft.training.files import write_manifest
from rim_peft.training.interruption import SaveAfterEpoch
from rim_peft.training.launch import check_launch
from rim_peft.training.processes import on_main
from rim_peft.training.sharding import (
    fill_adapter,
    fill_optimizer,
    gather_adapter,
    gather_optimizer,
    is_sharded,
    keep_memory,
)
from rim_peft.training.weights import check_checkpoint, last_checkpoint
from rim_peft.tuner.tensors import read_tensors

ADAPTER_WEIGHTS, OPTIMIZER, SCHEDULER = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"


class Checkpoints(SFTTrainer):
    """A trainer that resumes from whole checkpoints alone, and to the same weights.

    Where the model is sharded it gathers the adapter and its optimiser: transformers would gather the whole base to
    write its adapter, and keep the optimiser in another form.
    """

    model: Any
    lr_scheduler: Any
    trains_sharded = True  # all passes over the base lie in one forward pass of the model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SaveAfterEpoch())
        check_launch(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint: the one that is named, or with True the latest that is whole.

        Raises:
            ValueError: the checkpoint is damaged, or none is whole.
        """
        if resume_from_checkpoint is True:
            folder = Path(str(self.args.output_dir))
            if (latest := on_main(lambda: last_checkpoint(folder))) is None:
                raise ValueError(
                    f"resume_from_checkpoint: must have a whole checkpoint in {folder}, got none. Leave it out."
                )
            resume_from_checkpoint = str(latest)
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            if (damage := on_main(lambda: check_checkpoint(checkpoint))) is not None:
                raise ValueError(
                    f"resume_from_checkpoint: must be whole, got {checkpoint}, where {damage}. Give an older one."
                )
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer looks at the number of steps after a step alone: from a checkpoint of the last one it would take
        # one more. What an epoch's end brings is in it (`SaveAfterEpoch`).
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:
            return {}  # `eval_on_start` of a run that goes on, which has not started now
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(str(self.args.output_dir)) / name
        on_main(lambda: shutil.rmtree(folder, ignore_errors=True))  # one that was cut off or damaged
        super()._save_checkpoint(*args, **kwargs)
        on_main(lambda: write_manifest(folder))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state, which is written next, says that a checkpoint is complete: so other processes' parts come first.
        self.accelerator.wait_for_everyone()

    def release(self) -> None:
        """Let go of the model after training, so that another trainer can take it up; only DeepSpeed holds it."""
        if self.is_deepspeed_enabled:
            self.accelerator.free_memory()
            AcceleratorState._reset_state()  # accelerate takes one DeepSpeed plugin, and each stage comes with its own

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(self.model):
            # The stage before has left it so. accelerate would look for layers to shard, whose classes have new names,
            # and transformers would wrap `generate` twice, after which the weights are let go of too early.
            self.accelerator.state.fsdp_plugin.auto_wrap_policy = None
            vars(self.model).pop("generate", None)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if is_sharded(self.model):
            keep_memory(self.model)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; every process must call it."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=gather_adapter(self.model))  # which writes in the main process alone

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        fill_adapter(self.model, read_tensors(self._adapter_file(resume_from_checkpoint)))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        path = self._adapter_file(str(self.state.best_model_checkpoint))
        if not path.is_file():
            raise FileNotFoundError(
                f"load_best_model_at_end: {path} must hold the best weights, and is not there. Keep the checkpoints "
                "until the training has ended."
            )
        fill_adapter(self.model, read_tensors(path))
        self.model.eval()  # as PEFT leaves a model that it has loaded

    def _adapter_file(self, checkpoint: str) -> Path:
        """Return the active adapter's file in a checkpoint; PEFT gives every name but the default a folder."""
        name = str(self.model.active_adapter)
        return Path(checkpoint, "" if name == "default" else name, ADAPTER_WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        fill_optimizer(self.optimizer, torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
