"""Training steps on a prepared batch, by the real trainers: exactly one step of a training.

Rows are random token ids and count as already tokenised, so no text or real tokenizer is needed.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rim_peft.sequence import IGNORE_INDEX, Layout
from rim_peft.training import GroundingConfig, GroundingTrainer, RefinementConfig, RefinementTrainer
from rim_peft.training.readout_trainer import arrange_rows

STAGES: dict[str, tuple[Any, Any]] = {
    "stage 1": (GroundingTrainer, GroundingConfig),
    "stage 2": (RefinementTrainer, RefinementConfig),
}


@dataclass(frozen=True)
class RowSizes:
    """Rows of one shape, so that no row is padded.

    Attributes:
        batch: samples.
        prompt: tokens of a prompt, n.
        readout: tokens of the answer, and of each step.
        num_steps: reasoning steps of a sample, which stage 1 reads out.
    """

    batch: int
    prompt: int
    readout: int = 8
    num_steps: int = 4

    def tokens(self, num_blocks: int, block_length: int = 4) -> int:
        """Return the tokens of the batch: each row is a prompt and K blocks with a readout each."""
        return self.batch * (self.prompt + num_blocks * (block_length + self.readout))


@dataclass
class TrainingStep:
    """A trainer that has started its training, and one batch of its data loader.

    Attributes:
        trainer: the trainer, with its optimiser created and its model prepared.
        model: the model as the trainer's loop calls it.
        batch: the batch where the trainer expects it: on the host, or for TRL's own on the device.
    """

    trainer: Any
    model: Any
    batch: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Real tokens of the batch."""
        return int(self.batch["attention_mask"].sum())

    @property
    def labels(self) -> int:
        """Predicted tokens of the batch."""
        name = "shift_labels" if "shift_labels" in self.batch else "labels"
        return int((self.batch[name] != IGNORE_INDEX).sum())

    def rows(self) -> tuple[Layout, Tensor]:
        """Return the rows of a readout step's batch and the weights of its readouts, as arranged by the loss."""
        layout = Layout(**{name: value for name, value in self.batch.items() if name != "num_steps"})
        num_blocks = (layout.block_ends >= 0).sum(dim=1)
        weights = self.trainer.objective.weights(self.batch["num_steps"], num_blocks, progress=0.0)
        return arrange_rows(self.trainer.args, layout, weights), weights

    def loss(self) -> Tensor:
        """Return the trainer's loss of a forward pass."""
        with self.trainer.compute_loss_context_manager():
            return self.trainer.compute_loss(self.model, dict(self.batch))

    def alone(self) -> None:
        """Run forward and backward in this process without the others."""
        with self.trainer.compute_loss_context_manager():
            self.trainer.compute_loss(self.trainer.model, dict(self.batch)).backward()
        self.model.zero_grad(set_to_none=True)

    def forward_and_backward(self) -> None:
        """Run forward and backward of the loss, and drop the gradients."""
        self.trainer.training_step(self.model, dict(self.batch))
        self.model.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        """Run a whole step: forward, backward and optimiser."""
        self.trainer.training_step(self.model, dict(self.batch))
        self.trainer.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def held_tensors(self) -> Iterator[Tensor]:
        """Yield what stays in memory between steps: weights, buffers, optimiser state and batch."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.trainer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield from self.batch.values()


def readout_step(model: PeftModel, stage: str, sizes: RowSizes, *, checkpointing: bool = False) -> TrainingStep:
    """Return a step of a stage on a model with a RiM adapter; stage 1 has every readout at full weight."""
    rows = random_rows(model, sizes)
    return steps_on_batches(model, stage, rows, batch=sizes.batch, gradient_checkpointing=checkpointing)[0]


def steps_on_batches(model: PeftModel, stage: str, rows: Dataset, *, batch: int, **options: Any) -> list[TrainingStep]:
    """Return a step of a stage for each batch of the rows, in order; ``options`` go to the stage's config."""
    trainer_class, config_class = STAGES[stage]
    arguments = _arguments(batch, checkpointing=False, device=model.device.type)
    args = config_class(**{**arguments, "train_sampling_strategy": "sequential", **options})
    trainer = trainer_class(model, args, rows, processing_class=_tokenizer(), callbacks=[_StopAfterOneStep()])
    return _begun(trainer)


def plain_step(model: PeftModel, *, batch: int, length: int, labels: int, checkpointing: bool = False) -> TrainingStep:
    """Return a step of TRL's trainer on ordinary causal rows, with labels on their last ``labels`` tokens."""
    sizes = RowSizes(batch=batch, prompt=length)
    prompts = random_rows(model, sizes)["prompt_ids"]
    targets = [[IGNORE_INDEX] * (length - labels) + row[length - labels :] for row in prompts]
    rows = Dataset.from_dict({"input_ids": prompts, "labels": targets})
    args = SFTConfig(
        **_arguments(batch, checkpointing=checkpointing, device=model.device.type),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return _begun(
        SFTTrainer(model, args, train_dataset=rows, processing_class=_tokenizer(), callbacks=[_StopAfterOneStep()])
    )[0]


def random_rows(model: Any, sizes: RowSizes) -> Dataset:
    """Return tokenised rows of random ids, all of one shape."""
    lengths = (sizes.prompt, [sizes.readout] * sizes.num_steps, sizes.readout)
    return rows_of_lengths(model, [lengths] * sizes.batch)


def rows_of_lengths(model: Any, lengths: Sequence[tuple[int, list[int], int]]) -> Dataset:
    """Return tokenised rows of random ids, with the given tokens of each row's prompt, steps and answer."""
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, size, (count,), generator=generator).tolist()

    return Dataset.from_dict(
        {
            "prompt_ids": [ids(prompt) for prompt, _, _ in lengths],
            "step_ids": [[ids(step) for step in steps] for _, steps, _ in lengths],
            "answer_ids": [ids(answer) for _, _, answer in lengths],
        }
    )


class _StopAfterOneStep(TrainerCallback):
    """Ends a training after one step, when everything that a step needs exists."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def _begun(trainer: Any) -> list[TrainingStep]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.optimizer.zero_grad()
    batches = trainer.get_train_dataloader()
    return [TrainingStep(trainer, trainer.model_wrapped, trainer._prepare_inputs(batch)) for batch in batches]


def _arguments(batch: int, *, checkpointing: bool, device: str) -> dict[str, Any]:
    return {
        "output_dir": _folder().name,
        "per_device_train_batch_size": batch,
        "gradient_checkpointing": checkpointing,
        # Many more than the one step done, so that stage 1 stays at its beginning.
        "max_steps": 1_000_000,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder that trainers require and leave empty; it is deleted with the process."""
    return tempfile.TemporaryDirectory(prefix="rim-peft-benchmarks-")


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer for the trainer's padding; no text is read."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
