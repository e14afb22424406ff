"""A short curriculum that one process or several run; the test beside it starts it under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file

from rim_peft import GroundingConfig, RefinementConfig
from rim_peft.training.curriculum import run_curriculum
from tests.conftest import build_rim, build_tokenizer

ROWS = [
    {"question": f"{a}+{b}", "steps": [str(a), str(a + b)], "answer": str(a + b)} for a in range(4) for b in range(4)
]


def train(folder: Path, **batches: int) -> PeftModel:
    """Run both stages for four steps each; ``batches`` say how large a batch is."""
    model = build_rim(num_blocks=3)
    options: dict[str, Any] = {
        **batches,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    run_curriculum(
        model,
        build_tokenizer(),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:6]),  # three batches, which two processes cannot share evenly
        output_dir=folder,
        grounding=GroundingConfig(output_dir=str(folder / "grounding"), **options),
        refinement=RefinementConfig(output_dir=str(folder / "refinement"), **options),
        validate=lambda model: {"accuracy": 0.5},
    )
    return model


if __name__ == "__main__":
    target = Path(sys.argv[1])
    by_rows = train(target, per_device_train_batch_size=2)
    by_tokens = train(target / "tokens", max_tokens_per_batch=200)
    for folder, trained in ((target, by_rows), (target / "tokens", by_tokens)):
        weights = {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}
        save_file(weights, folder / f"rank{os.environ['RANK']}.safetensors")
