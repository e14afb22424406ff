"""Writes the adapters of ``stored_adapter/``, which every later version has to load and to answer alike with.

``python -m tests.integration.store_adapter tests/integration/stored_adapter/v1`` made those of format version 1. A
later format gets a folder of its own beside it; stored ones are never made anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from rim_peft import RiMConfig, __version__

BASE = Path(__file__).parents[2] / "rim_peft" / "demo" / "base"
PROMPT = [20, 30, 40, 50, 11, 60]
NUM_TOKENS = 8

ADAPTERS: dict[str, RiMConfig] = {
    "plain": RiMConfig(
        num_blocks=3, r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 6, 13], lora_dropout=0.1
    ),
    "variants": RiMConfig(
        num_blocks=2,
        block_size=3,
        insertion_layer=5,
        bidirectional_blocks=True,
        r=1,
        use_dora=True,
        use_rslora=True,
        target_modules=["o_proj", "gate_proj"],
        layers_to_transform=[4, 9],
    ),
    "memory_only": RiMConfig(num_blocks=4, block_size=1, r=0),
}


def base_sha256() -> str:
    """SHA-256 of the base's weights."""
    return hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()


def answer(model: Any) -> dict[str, Any]:
    """The logits after the prompt and its blocks, and the tokens that follow."""
    config = model.peft_config["default"]
    first, size = config.first_memory_id, config.block_size
    blocks = [first, *[first + 1] * size, first + 2] * config.num_blocks
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT + blocks])).logits[0, -1]
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    return {"logits": logits.tolist(), "tokens": tokens[0, len(PROMPT) :].tolist()}


def store(folder: Path) -> None:
    """Write each adapter and what it answers."""
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".lora_B." in key:
                    parameter.normal_(0, 0.3)
        model.peft_config["default"].base_model_name_or_path = "rim_peft/demo/base"
        model.eval().save_pretrained(str(folder / name), save_embedding_layers=False)
        (folder / name / "README.md").unlink()
        expected = {"made_by": __version__, "base_sha256": base_sha256(), **answer(model)}
        (folder / name / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store(Path(sys.argv[1]))
