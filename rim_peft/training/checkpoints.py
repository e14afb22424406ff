"""What a checkpoint holds: the same files whether one process trained, or several with a part of the weights each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from trl import SFTTrainer

from rim_peft.training.sharding import fill_adapter, fill_optimizer, gather_adapter, gather_optimizer, is_sharded

ADAPTER_WEIGHTS, OPTIMIZER, SCHEDULER = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"


class Checkpoints(SFTTrainer):
    """A trainer that gathers the adapter and its optimiser where the model is sharded.

    transformers' own checkpoints of a sharded model hold the whole base, or shards that other numbers of processes
    cannot read.
    """

    model: Any

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(self.model):
            # The stage before has left it so; accelerate would look for layers to shard, whose classes have new names.
            self.accelerator.state.fsdp_plugin.auto_wrap_policy = None
        return super()._prepare_for_training(*args, **kwargs)

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
        fill_adapter(self.model, load_file(Path(resume_from_checkpoint) / ADAPTER_WEIGHTS))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        fill_optimizer(self.optimizer, torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
