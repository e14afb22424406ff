"""Tiny random models and a tokenizer, built in code: on the CPU, in float32, offline, the same in every run."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from rim_peft import RiMConfig
from rim_peft.training.files import hold
from tests.training import ROWS

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # one token for each byte

ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3", "gemma3", "mistral")
"""Tied heads: gpt2, qwen2, gemma3. Sliding windows: gemma3 (every other layer), mistral (all)."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# A wide initialisation makes the answers of random models vary from token to token.
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "initializer_range": 0.3,
}
_DECODER: dict[str, Any] = {
    **_SHARED,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
    "initializer_range": 0.1,
}
_BUILDERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**_DECODER, "tie_word_embeddings": False}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {**_DECODER, "tie_word_embeddings": True}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {**_SHARED, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_DECODER, "head_dim": 8, "tie_word_embeddings": False}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**_DECODER, **_GEMMA}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_DECODER, "sliding_window": 6, "tie_word_embeddings": False}),
}

# PEFT and transformers type a model's attributes as "Tensor or Module", which says nothing: Any.
MakeBase = Callable[..., Any]
MakeRim = Callable[..., Any]
MakeTrainer = Callable[..., Any]


def build_base(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random model in evaluation mode; ``overrides`` go to its config."""
    model_cls, config_cls, settings = _BUILDERS[architecture]
    torch.manual_seed(seed)
    return model_cls(config_cls(**{**settings, **overrides})).eval()


def build_rim(architecture: str = "llama", *, base: Any = None, fresh: bool = False, **options: Any) -> Any:
    """A RiM model in evaluation mode, by default with two blocks, rank 4 and LoRA weights that do something."""
    base = build_base(architecture) if base is None else base
    torch.manual_seed(1)
    model: Any = get_peft_model(base, RiMConfig(**{"num_blocks": 2, "r": 4, **options}))
    if not fresh:
        randomize_lora(model)
    return model.eval()


def randomize_lora(model: nn.Module) -> None:
    """Fill every LoRA B, which starts at zero, as if the adapter had been trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)


def build_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with padding on the left and a chat template: any text, back and forth."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            "pad_token": "<pad>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "padding_side": "left",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            **options,
        },
    )


def save_base(folder: Path, architecture: str = "llama", *, tokenizer: Any = None, **overrides: Any) -> Path:
    """Write a tiny base with a tokenizer; ``overrides`` go to its config."""
    build_base(architecture, **overrides).save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base; a test that changes it makes its own."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make_base() -> MakeBase:
    return build_base


@pytest.fixture
def make_rim() -> MakeRim:
    return build_rim


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> MakeTrainer:
    """Make a trainer of a class for a model; ``options`` go to its configuration."""

    def make(trainer_class: Any, model: Any, *, rows: Any = ROWS, **options: Any) -> Any:
        defaults: dict[str, Any] = {"processing_class": tokenizer, "peft_config": None, "validate": None}
        own = {name: options.pop(name, value) for name, value in defaults.items()}
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "report_to": "none",
            "learning_rate": 1e-2,
        }
        args = trainer_class.config_class(**{**settings, **options})
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return trainer_class(model, args, train_dataset=rows, **own)

    return make


switches_natively = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' own set_adapter, disable_adapters and save_pretrained need PEFT {MIN_PEFT_VERSION}",
)
"""For tests of adapters that transformers itself loaded; it loads with any PEFT, but from 5.24 on no more than that."""


_PROCESS = os.getpid()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test's forked child ends with the test, however it leaves it: pytest would go on in both processes."""
    try:
        yield
    finally:
        if os.getpid() != _PROCESS:
            traceback.print_exc()
            os._exit(1)


@pytest.fixture(autouse=True)
def _own_log_levels() -> Iterator[None]:
    """The command sets log levels for its process, which is that of other tests here.

    They are set before a test too: fixtures of a wider scope, which come first, may have run it.
    """
    _reset_log_levels()
    yield
    _reset_log_levels()


def _reset_log_levels() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("rim_peft").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Trainers set variables of accelerate for their process, which later launches would take for the user's."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests cache, also in processes that they start, out of the user's own cache."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        # What a killed process left half-written in the user's, torch would load.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium by Playwright, for tests marked by ``tests.browser.needs_browser``."""
    from tests.browser import open_browser

    with open_browser() as running:
        yield running


@contextmanager
def held_by_a_child(folder: Path) -> Iterator[int]:
    """Let a child hold a folder; yield its id."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        with hold(folder):
            os.write(done, b"x")
            signal.pause()
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(done)
