"""RiM's place in TRL's trainer and in transformers' Trainer below it: the only module that touches their private parts.

:class:`PluggedTrainer` overrides their private steps. Its subclasses see methods without an underscore: what is done
with rows, in which order they come, before an epoch and a checkpoint, after loading. ``CONTACTS`` says of each private
part what it is needed for; a test compares the list with the installed versions and with this file.
"""

from __future__ import annotations

import shutil
from copy import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from rim_peft.training.checkpoints import ADAPTER_WEIGHTS, check_checkpoint, last_checkpoint
from rim_peft.training.distributed import (
    check_launch,
    fill_adapter,
    fill_optimizer,
    gather_adapter,
    gather_optimizer,
    is_sharded,
    keep_memory,
    on_main,
)
from rim_peft.training.files import write_manifest
from rim_peft.training.interruption import SaveAfterEpoch
from rim_peft.tuner.peft_plugin import Contact
from rim_peft.tuner.tensors import read_tensors

_TRAINER, _SFT = "transformers.Trainer.", "trl.SFTTrainer."
_ROWS = ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")
_SHARDS = "gathers only the adapter of a sharded model, where the Trainer would gather the whole base"

CONTACTS = (
    Contact(_SFT + "_prepare_dataset", "rows become prompt, steps and answer, not one text", "none", parameters=_ROWS),
    Contact(_SFT + "_tag_names", "tags of a model card", "none before the card is written"),
    Contact(_TRAINER + "_get_train_sampler", "short chains first", "an own data loader", parameters=("train_dataset",)),
    Contact(
        _TRAINER + "_run_epoch", "resumed after its last step, a training takes no further one", "none", ("epoch",)
    ),
    Contact(_TRAINER + "_prepare_inputs", "a batch stays on the host until its rows are arranged", "none", ("inputs",)),
    Contact(_TRAINER + "_track_num_input_tokens", "tokens are counted in arranged rows", "none", ("inputs",)),
    Contact(
        _TRAINER + "_save_checkpoint", "a manifest behind a checkpoint's last file", "on_save, which has no before"
    ),
    Contact(_TRAINER + "_save_rng_state", "waits for all processes' parts", "none", ("output_dir",)),
    Contact(_TRAINER + "_load_callback_state", "keeps our own states out of what is restored by class name", "none"),
    Contact(
        _TRAINER + "_finalize_training", "a resumed training's time includes the time before", "none", ("start_time",)
    ),
    Contact(_TRAINER + "_prepare_for_training", "a second stage gets a model that is sharded already", "none"),
    Contact(_TRAINER + "_save", _SHARDS, "none", ("output_dir", "state_dict")),
    Contact(_TRAINER + "_save_optimizer_and_scheduler", _SHARDS, "none", ("output_dir",)),
    Contact(_TRAINER + "_load_from_checkpoint", _SHARDS, "none", ("resume_from_checkpoint", "model")),
    Contact(_TRAINER + "_load_best_model", _SHARDS, "none"),
    Contact(_TRAINER + "_load_optimizer_and_scheduler", _SHARDS, "none", ("checkpoint",)),
    *(
        Contact(_TRAINER + name, "a resumed log line has the loss of the steps before the stop", "none")
        for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
    ),
    Contact("accelerate.state.AcceleratorState._reset_state", "each stage has its own DeepSpeed plugin", "none"),
    Contact("trl.trainer.utils.add_fused_lm_head", "the head on supervised positions alone", "none", ("outputs",)),
    *(
        Contact(f"trl.kernels.chunked_logprob.{name}", "a simulated step allocates as a GPU's kernels do", "none")
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")
    ),
)

FUSED_TILES = tuple((chunked_logprob, name) for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"))
"""The steps of TRL's fused head that work in place on a tile of logits on a GPU."""

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


def fuse_head(model: Any) -> None:
    """Give a causal language model TRL's fused head, with the outputs that TRL's trainer requests."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


class PluggedTrainer(SFTTrainer):
    """A trainer that resumes only from intact checkpoints and ends with the same weights as without a stop.

    With a sharded model it gathers only the adapter and its optimiser. transformers would gather the whole base to
    write the adapter, and would store the optimiser in another format.
    """

    model: Any
    args: Any
    lr_scheduler: Any
    trains_sharded = True  # one forward pass of the model contains all passes over the base
    own_states: ClassVar[tuple[str, ...]] = ()
    """Names of states in a checkpoint that this trainer reads itself."""
    _tag_names = ["trl", "peft", "rim", "latent-reasoning"]  # noqa: RUF012 - TRL's own class attribute

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SaveAfterEpoch())
        check_launch(self)

    def prepare_rows(self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> Dataset | IterableDataset:
        """Return the tokenised rows of a dataset; each trainer has its own way."""
        raise NotImplementedError  # not abstract: transformers' and TRL's classes are no ABCs

    def row_order(self) -> Any:
        """Return the sampler of training rows; None for a stream."""
        return super()._get_train_sampler()

    def before_epoch(self, epoch: int) -> None:
        """Called before each pass over the rows, counted from 0."""

    def before_checkpoint(self) -> None:
        """Called before a checkpoint is written, in every process."""

    def after_loading(self, checkpoint: str) -> None:
        """Called when a checkpoint's weights have been loaded."""

    def seconds_before(self) -> float:
        """Return the seconds that the training took before it was resumed."""
        return 0.0

    def loss_so_far(self) -> dict[str, Any]:
        """Return the sums of losses, for each process those since the last log line; every process must call it.

        JSON keeps floats at full precision, so a resumed training ends with the same figures.
        """
        return {
            "loss": self.accelerator.gather(self._tr_loss[None]).tolist(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "first_step": getattr(self, "_initial_global_step", 0),  # missing in transformers before 5.23
        }

    def continue_loss(self, kept: dict[str, Any]) -> None:
        """Continue with the result of :meth:`loss_so_far`."""
        self._tr_loss = torch.tensor(kept["loss"][self.accelerator.process_index], device=self.args.device)
        self._total_loss_scalar = kept["total_loss"]
        self._globalstep_last_logged = kept["last_logged"]
        self._initial_global_step = kept["first_step"]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume from a checkpoint: the given one or, with True, the latest intact one.

        Raises:
            ValueError: the checkpoint is damaged, or there is no intact one.
        """
        if resume_from_checkpoint is True:
            folder = Path(str(self.args.output_dir))
            if (latest := on_main(lambda: last_checkpoint(folder))) is None:
                raise ValueError(f"resume_from_checkpoint: needs an intact checkpoint in {folder}, got none. Omit it.")
            resume_from_checkpoint = str(latest)
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            if (damage := on_main(lambda: check_checkpoint(checkpoint))) is not None:
                raise ValueError(
                    f"resume_from_checkpoint: must be intact, got {checkpoint}, where {damage}. Give an older one."
                )
        if resume_from_checkpoint:
            self.args = copy(self.args)
            self.args.eval_on_start = False  # the training has started before
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def release(self) -> None:
        """Release the model after training so that another trainer can use it; only DeepSpeed holds on to it."""
        if self.is_deepspeed_enabled:
            self.accelerator.free_memory()
            AcceleratorState._reset_state()  # accelerate takes one DeepSpeed plugin, but each stage has its own

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimiser step, and their number of samples in all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = torch.tensor(sum(len(batch["input_ids"]) for batch in batches), device=self.args.device)
        return batches, self.accelerator.gather(count).sum()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; every process must call it."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=gather_adapter(self.model))  # writes in the main process only

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: Any, formatting_func: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        return self.prepare_rows(dataset, processing_class, dataset_name)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.row_order()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        pass

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer compares the number of steps only after a step, so from a checkpoint of the last step it would
        # take one more. That checkpoint already has the log line and scores of the epoch's end (`SaveAfterEpoch`).
        if self.state.global_step < self.state.max_steps:
            self.before_epoch(kwargs["epoch"])
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.before_checkpoint()
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        on_main(lambda: shutil.rmtree(folder, ignore_errors=True))  # an incomplete or damaged one
        super()._save_checkpoint(*args, **kwargs)
        on_main(lambda: write_manifest(folder))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state is written next and marks the checkpoint as complete, so wait for the other processes' parts.
        self.accelerator.wait_for_everyone()

    def _load_callback_state(self) -> None:
        # With `restore_callback_states_from_checkpoint` the Trainer creates again every callback that has state in a
        # checkpoint. Some belong to this trainer and read their state themselves, so hide it.
        kept: Any = self.state.stateful_callbacks
        own = {name: kept.pop(name) for name in self.own_states if name in kept}
        super()._load_callback_state()
        kept.update(own)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, start_time - self.seconds_before())

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(self.model):
            # Sharded by the previous stage. accelerate would look for layer classes to shard, which have new names by
            # now, and transformers would wrap `generate` twice, which releases the weights too early.
            self.accelerator.state.fsdp_plugin.auto_wrap_policy = None
            vars(self.model).pop("generate", None)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if is_sharded(self.model):
            keep_memory(self.model)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        fill_optimizer(self.optimizer, torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            fill_adapter(self.model, read_tensors(self._adapter_file(resume_from_checkpoint)))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.after_loading(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        path = self._adapter_file(str(self.state.best_model_checkpoint))
        if not path.is_file():
            raise FileNotFoundError(
                f"load_best_model_at_end: {path} must hold the best weights, but is missing. Keep the checkpoints "
                "until the training has ended."
            )
        fill_adapter(self.model, read_tensors(path))
        self.model.eval()  # as PEFT does after loading

    def _adapter_file(self, checkpoint: str) -> Path:
        """Return the active adapter's file in a checkpoint; PEFT gives every adapter but ``default`` a subfolder."""
        name = str(self.model.active_adapter)
        return Path(checkpoint, "" if name == "default" else name, ADAPTER_WEIGHTS)
