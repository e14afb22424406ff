"""Bases with random weights built from configs, and adapters on them: speed does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from benchmarks.registry import Settings
from rim_peft import RiMConfig

_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Without an end token, answers have the requested length.
_ENDLESS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_LLAMA_3 = {"vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8, "tie_word_embeddings": True}
_QWEN_3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def _llama(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**{"max_position_embeddings": 4096, **_ENDLESS, **sizes})


CONFIGS: dict[str, Any] = {
    # nf4 needs layers of at least 64.
    "tiny": lambda: _llama(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    # Matrices that keep two cores busy: below a width of about 256, starting operations dominates.
    "small": lambda: _llama(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6
    ),
    # GPT-2's width and two of its twelve layers: attention's share of a layer is as in real models.
    "wide": lambda: _llama(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=12
    ),
    "smollm2-135m": lambda: _llama(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "gpt2-124m": lambda: GPT2Config(**_NO_DROPOUT, **_ENDLESS),
    "llama-3.2-1b": lambda: _llama(
        **_LLAMA_3, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64
    ),
    "llama-3.2-3b": lambda: _llama(
        **_LLAMA_3, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128
    ),
    "qwen3-0.6b": lambda: Qwen3Config(**_QWEN_3, **_ENDLESS, hidden_size=1024, intermediate_size=3072),
    "qwen3-1.7b": lambda: Qwen3Config(**_QWEN_3, **_ENDLESS, hidden_size=2048, intermediate_size=6144),
    "gemma-3-1b": lambda: Gemma3TextConfig(
        **_ENDLESS,
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
}
"""Configs by name of the base: three sizes for the CPU, and shapes of real models, the paper's three first."""

WEIGHTS = ("fp32", "bf16", "nf4")
"""Weight types of the frozen base."""


def build_base(name: str, settings: Settings, *, weights: str | None = None, vocab_size: int | None = None) -> Any:
    """Return a base with random weights on the run's device, in evaluation mode.

    Args:
        name: one of ``CONFIGS``.
        settings: the run.
        weights: one of ``WEIGHTS``, or ``"int8"``; by default float32 on the CPU and bfloat16 on CUDA.
        vocab_size: vocabulary size, if it differs from the config's.

    Raises:
        ImportError: ``weights`` is ``"nf4"`` or ``"int8"`` and bitsandbytes is not installed.
    """
    is_cuda = settings.device == "cuda"
    config = CONFIGS[name]()
    config.vocab_size = vocab_size or config.vocab_size
    # The type of computation, and of unquantised weights beside quantised ones, as in `rim-peft train`.
    dtype = torch.bfloat16 if weights == "bf16" or (is_cuda and weights != "fp32") else torch.float32
    torch.manual_seed(0)
    with torch.device(settings.device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return (_quantized(base, dtype, weights) if weights in ("nf4", "int8") else base).eval()


def _quantized(base: Any, dtype: torch.dtype, weights: str) -> Any:
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    if weights == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return type(base).from_pretrained(
        None,
        config=base.config,
        state_dict=base.state_dict(),
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": base.device},
    )


def lora_rank(settings: Settings) -> int:
    """Return the paper's rank at real sizes, and for the CPU's sizes the same share of the width."""
    return settings.choose(quick=4, cpu=16, cuda=128)


def attach_rim(base: Any, *, rank: int, num_blocks: int = 8) -> Any:
    """Attach a RiM adapter of this rank to all linear layers, with the paper's two memory tokens per block (B = 4)."""
    return get_peft_model(base, RiMConfig(num_blocks=num_blocks, r=rank))


def attach_lora(base: Any, *, rank: int) -> Any:
    """Attach the same LoRA without memory."""
    return get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    )


def random_prompts(model: Any, *, batch: int, length: int) -> torch.Tensor:
    """Return (B, S) random token ids of the base's own vocabulary, on the model's device."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(3, size, (batch, length), generator=torch.Generator().manual_seed(0)).to(model.device)
