"""Trainings that one process does, or several; the tests beside it start this module through ``accelerate launch``.

Each process leaves in the folder what it ended with: ``codes<rank>.json``, the exit codes of the command, and
``<training>/rank<rank>.safetensors``, its adapter.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from rim_peft import GroundingConfig, GroundingTrainer, RefinementConfig
from rim_peft.cli.main import main
from rim_peft.training.curriculum import run_curriculum
from rim_peft.training.distributed import gather_adapter, shards_weights
from rim_peft.training.readout_trainer import ReadoutTrainer
from tests.conftest import build_rim, build_tokenizer

ROWS = [
    {"question": f"{a}+{b}", "steps": [str(a), str(a + b)], "answer": str(a + b)} for a in range(4) for b in range(4)
]
SAMPLES = 4
"""Samples of an optimiser step, in all processes together."""
_STAGE = {
    "max_steps": 4,
    "learning_rate": 1e-2,
    "per_device_eval_batch_size": 2,
    "save_steps": 10,  # so that the only checkpoints are those of the signal and of the end
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
RECIPE = {
    "model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        }
    },
    "adapter": {"r": 4, "num_blocks": 3},
    "data": {"task": "potions", "options": {"num_rows": 32, "lengths": [1, 2]}, "validation_rows": 6},
    "grounding": {**_STAGE, "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 3},
    "refinement": {**_STAGE, "gradient_checkpointing": True},
    "evaluation": {"max_new_tokens": 3},
}
"""Tied heads, gradient checkpointing, and answers to validation questions within a stage and at its end."""


def train_by_command(folder: Path, *, num_processes: int, resume: bool = False) -> int:
    """Train the recipe into ``folder/run`` and return the command's exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / f"recipe{os.environ.get('RANK', '0')}.yaml"
    recipe.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **RECIPE}))
    sizes = [f"{stage}.per_device_train_batch_size={SAMPLES // num_processes}" for stage in ("grounding", "refinement")]
    return main(["train", str(recipe), *sizes, *(["resume=true"] if resume else [])])


def train_by_hand(folder: Path, **options: Any) -> PeftModel:
    """Run both stages on a base whose head is not tied, the second with the first one's moments."""
    model: PeftModel = build_rim(num_blocks=3)
    stage = {**_STAGE, **options, "gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 2}
    run_curriculum(
        model,
        build_tokenizer(),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:6]),  # three batches, which two processes cannot share evenly
        output_dir=folder,
        grounding=GroundingConfig(output_dir=str(folder / "grounding"), **stage),
        refinement=RefinementConfig(output_dir=str(folder / "refinement"), reset_optimizer=False, **stage),
        validate=lambda model: {"accuracy": 0.5},
    )
    return model


def train_by_length(folder: Path, *, num_processes: int, resume: bool = False) -> PeftModel:
    """Train on short chains first over three epochs, or go on from within the second one."""
    model: PeftModel = build_rim(num_blocks=3)
    size = SAMPLES // num_processes
    args = GroundingConfig(
        **{**_STAGE, "max_steps": 12, "save_steps": 7},
        output_dir=str(folder),
        length_shares=[0.4, 0.6],
        layer_shares=None if shards_weights() else [0.5, 1.0],
        per_device_train_batch_size=size,
        gradient_checkpointing=False,
    )
    rows = [{**row, "steps": row["steps"][: 1 + index % 2]} for index, row in enumerate(ROWS)]
    trainer = GroundingTrainer(model, args, Dataset.from_list(rows), processing_class=build_tokenizer())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-7") if resume else None)
    return model


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return an adapter's whole tensors."""
    gathered = gather_adapter(model)
    if gathered is None:
        gathered = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return gathered


def allow_fsdp_on_cpu() -> None:
    """Let accelerate, which runs FSDP on GPUs alone, run it on a CPU; nothing else is changed."""
    original = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:  # what it does itself for GPUs
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = __init__


def send_signal_at(step: int) -> None:
    """Send this process SIGTERM when the first stage reaches a step, once."""
    original = ReadoutTrainer.training_step

    def training_step(trainer: ReadoutTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if trainer.state.global_step == step:
            ReadoutTrainer.training_step = original  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    ReadoutTrainer.training_step = training_step  # type: ignore[method-assign]


def _run(folder: Path, rank: int, num_processes: int) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    if rank == num_processes - 1:  # the others must learn of it
        send_signal_at(2)
    codes = [
        train_by_command(folder, num_processes=num_processes),  # is stopped
        train_by_command(folder, num_processes=num_processes, resume=True),  # goes on to the end
        train_by_command(folder, num_processes=num_processes),  # is refused: the folder holds a run
    ]
    (folder / f"codes{rank}.json").write_text(json.dumps(codes))
    by_rows = train_by_hand(folder / "rows", per_device_train_batch_size=SAMPLES // num_processes)
    by_tokens = train_by_hand(folder / "tokens", max_tokens_per_batch=200)
    by_length = train_by_length(folder / "lengths", num_processes=num_processes)
    resumed = train_by_length(folder / "lengths", num_processes=num_processes, resume=True)
    (folder / "resumed").mkdir(exist_ok=True)
    for name, trained in (("rows", by_rows), ("tokens", by_tokens), ("lengths", by_length), ("resumed", resumed)):
        save_file(adapter_tensors(trained), folder / name / f"rank{rank}.safetensors")


if __name__ == "__main__":
    _run(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
