"""What a behaviour is tried on: one base, stored in one format, with RiM or stock LoRA on it in one configuration."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rim_peft import RiMConfig
from tests.conftest import PAD_ID, build_base, randomize_lora

ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3", "gemma3", "mistral")
BASES = tuple(f"{name}-{head}" for name in ARCHITECTURES for head in ("untied", "tied"))
FORMATS = ("fp32", "bf16", "nf4", "int8")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memory only": {"r": 0},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "insertion layer": {"insertion_layer": 1},
    "bidirectional": {"bidirectional_blocks": True},
}
"""Options of ``RiMConfig``. Stock LoRA gets those that are LoRA's."""

_OF_RIM = ("r", "insertion_layer", "bidirectional_blocks")
_DTYPES = {"bf16": torch.bfloat16}
_QUANTIZATION = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # nf4 needs 64
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT2_SIZES: dict[str, Any] = {"n_embd": 64, "initializer_range": 0.1, **_NO_DROPOUT}
_LIKENESS = {"fp32": 0.99999, "bf16": 0.99, "nf4": 0.8, "int8": 0.9}
"""Cosine of logits after weights were rounded anew, as merging does in a base's format."""

PROMPTS = torch.tensor([[20, 30, 40, 50, 60, 70], [PAD_ID, PAD_ID, 80, 90, 100, 110]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
ANSWERS = torch.tensor([[120, 130], [140, 150]])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": PAD_ID, "do_sample": False}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix, for RiM or for stock LoRA."""

    base: str
    format: str = "fp32"
    config: str = "plain"
    is_stock: bool = False

    def __str__(self) -> str:
        return f"{self.base}-{self.format}-{self.config.replace(' ', '_')}" + ("-stock" if self.is_stock else "")


class Subject:
    """Builds bases, configurations and adapted models of one case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.is_stock = case.is_stock
        self.options = {"num_blocks": 2, "r": 4, "lora_alpha": 8, **CONFIGS[case.config]}
        self.has_lora = case.is_stock or self.options["r"] > 0
        self.prompts: dict[str, Tensor] = {"input_ids": PROMPTS, "attention_mask": MASK}

    @property
    def is_rounded(self) -> bool:
        """Whether the base computes in a type in which the order of sums, or a batch's other rows, show."""
        return self.case.format in ("bf16", "int8")

    @property
    def load_options(self) -> dict[str, Any]:
        """What ``from_pretrained`` needs to give the base its format."""
        return load_options(self.case.format)

    @property
    def base_folder(self) -> str:
        """Where the base is stored."""
        return stored_base(self.case.base, self.case.format == "bf16")

    def base(self) -> Any:
        """A base of its own."""
        return copy.deepcopy(loaded_base(self.case.base, self.case.format))

    def config(self, **options: Any) -> LoraConfig:
        """A configuration of the case; ``options`` are LoRA's, or are left out for stock LoRA."""
        options = {"target_modules": "all-linear", **self.options, **options}
        if not self.is_stock:
            return RiMConfig(**options)
        options = {name: value for name, value in options.items() if name in LoraConfig.__dataclass_fields__}
        return LoraConfig(**{**options, "r": options["r"] or 4, "task_type": "CAUSAL_LM"})

    def model(self, *, base: Any = None, is_fresh: bool = False, **options: Any) -> Any:
        """An adapted model in evaluation mode, as if it had been trained unless ``is_fresh``."""
        base = self.base() if base is None else base  # which draws random numbers when it is made
        torch.manual_seed(1)
        model = get_peft_model(base, self.config(**options))
        if not is_fresh:
            pretend_training(model)
        return model.eval()

    def with_other(self, **options: Any) -> Any:
        """An adapted model with a second adapter, ``other``, beside ``default``, which is active."""
        model = self.model()
        model.add_adapter("other", self.config(**options))
        pretend_training(model)
        return model.eval()

    def batch(self, *, num_blocks: int = 2) -> dict[str, Tensor]:
        """Prompts, blocks (for RiM) and answers: what the model is trained on, padded on the left."""
        blocks = PROMPTS.new_empty(2, 0)
        if not self.is_stock:
            first = loaded_base(self.case.base, self.case.format).get_input_embeddings().weight.shape[0]
            block = [first, first + 1, first + 1, first + 2]
            blocks = torch.tensor(block * num_blocks).expand(2, -1)
        ids = torch.cat([PROMPTS, blocks, ANSWERS], dim=1)
        return {"input_ids": ids, "attention_mask": torch.cat([MASK, torch.ones_like(ids[:, 6:])], dim=1)}

    def labels(self) -> Tensor:
        """The answers as labels of a batch, (2, S)."""
        ids = self.batch()["input_ids"]
        return torch.cat([torch.full_like(ids[:, :-2], -100), ids[:, -2:]], dim=1)

    def logits(self, model: Any, batch: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
        """Float32 logits of a batch's tokens, padding left out, (N, V)."""
        batch = self.batch() if batch is None else batch
        with torch.no_grad():
            found: Tensor = model(**batch, **options).logits.float()
        return found[batch["attention_mask"].bool()]

    def plain_logits(self, model: Any, **options: Any) -> Tensor:
        """Logits of the prompts alone, which a base can read too."""
        return self.logits(model, self.prompts, **options)

    def generate(self, model: Any, **options: Any) -> Tensor:
        """The sequences that a model generates greedily to the padded prompts."""
        found: Tensor = model.generate(**self.prompts, **GREEDY, **options)
        return found

    def next_logits(self, model: Any, **options: Any) -> Tensor:
        """Logits of the first token that ``generate`` gives to the prompts, (2, V) float32."""
        settings = {**GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        found: Tensor = model.generate(**{**self.prompts, **settings, **options}).logits[0].float()
        return found

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of the adapters' parameters by name."""
        return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}

    def check_alike(self, found: Tensor, expected: Tensor) -> None:
        """Check that logits differ by no more than rounding to the base's format explains."""
        cosine = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
        assert float(cosine) >= _LIKENESS[self.case.format], f"cosine of logits: {float(cosine)}"
        if self.case.format == "fp32":
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def pretend_training(model: nn.Module) -> None:
    """Fill LoRA's B, which starts at zero, and DoRA's magnitudes, which start at the base's."""
    randomize_lora(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_magnitude_vector." in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))


def load_options(format_name: str) -> dict[str, Any]:
    """What ``from_pretrained`` needs for a format."""
    options: dict[str, Any] = {"dtype": _DTYPES.get(format_name, torch.float32)}
    if format_name in _QUANTIZATION:
        options["quantization_config"] = _QUANTIZATION[format_name]
    return options


@functools.cache
def stored_base(name: str, is_half: bool) -> str:
    """A base in a folder that lasts as long as the process."""
    architecture, _, head = name.partition("-")
    sizes = _GPT2_SIZES if architecture == "gpt2" else _SIZES
    base = build_base(architecture, **sizes, tie_word_embeddings=head == "tied")
    folder = tempfile.mkdtemp(prefix="parity-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base.to(torch.bfloat16 if is_half else torch.float32).save_pretrained(folder)
    return folder


@functools.cache
def loaded_base(name: str, format_name: str) -> Any:
    """A base in its format, to be copied: never to be run or wrapped."""
    folder = stored_base(name, format_name == "bf16")
    return AutoModelForCausalLM.from_pretrained(folder, **load_options(format_name)).eval()
