"""Three steps on an 8-bit base that one process or several run; the test beside it starts it under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from rim_peft import GroundingConfig, GroundingTrainer, RiMConfig
from rim_peft.recipe import ModelOptions
from rim_peft.run.base import load_base
from tests.conftest import build_tokenizer
from tests.integration.two_processes import ROWS


def train(base: Path, folder: Path, *, batch: int) -> dict[str, Tensor]:
    """Return the adapter's weights after stage 1 with checkpointed layers, as a recipe has it."""
    torch.manual_seed(0)
    loaded = load_base(str(base), ModelOptions(name_or_path=str(base), quantization="int8"))
    model: Any = get_peft_model(loaded, RiMConfig(num_blocks=3, r=4))
    args = GroundingConfig(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=batch,
        optim="sgd",
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    GroundingTrainer(model, args, Dataset.from_list(ROWS), processing_class=build_tokenizer()).train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    weights = train(source, target, batch=2)
    save_file(weights, target / f"rank{os.environ['RANK']}.safetensors")
