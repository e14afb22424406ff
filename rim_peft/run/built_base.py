"""A base built from a configuration, with random weights and a tokenizer trained on the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from rim_peft.data.examples import ROW_ERROR, Templates
from rim_peft.training.files import save_base

EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(
    rows: Iterable[Mapping[str, Any]], templates: Templates, *, vocab_size: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on rows; any text survives encoding and decoding.

    Args:
        vocab_size: maximum number of tokens.

    Raises:
        ValueError: the vocabulary has no room for the 256 bytes and two special tokens.
    """
    special = [EOS, PAD]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(special) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"model.config.vocab_size: must be at least {least}, one for each byte, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(rows, templates), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _texts(rows: Iterable[Mapping[str, Any]], templates: Templates) -> Iterator[str]:
    """Yield the texts of the readable rows."""
    for row in rows:
        if row.get(ROW_ERROR) is not None:
            continue
        question = row["question"]
        if isinstance(question, str):
            yield templates.prompt.format(question=question)
        else:
            yield from (message["content"] for message in question)
        yield from (templates.step.format(step=step) for step in row.get("steps") or ())
        yield templates.answer.format(answer=row["answer"])


def build_base(
    config: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], *, templates: Templates, seed: int, folder: Path
) -> None:
    """Write a base with random weights, and a tokenizer trained on the rows, to a folder, atomically.

    Args:
        config: ``model_type`` and the fields of its configuration.
        rows: training rows with question, steps and answer.
        folder: where to write; appears only once complete.
    """
    settings = dict(config)
    model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    tokenizer = train_tokenizer(rows, templates, vocab_size=model_config.get_text_config().vocab_size)
    model_config.eos_token_id = tokenizer.eos_token_id
    model_config.pad_token_id = tokenizer.pad_token_id
    model_config.bos_token_id = None
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    save_base(model, tokenizer, folder)
