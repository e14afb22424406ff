"""The tokenizer of a run: loaded with its base or from an adapter's folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rim_peft.data.chat_templates import check_chat_template
from rim_peft.data.sources import asking_hub
from rim_peft.recipe import ModelOptions
from rim_peft.run.base import locate_base, own_code_named, revision_of
from rim_peft.tuner.files import brief, is_ours, read_object
from rim_peft.tuner.tensors import AGAIN

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_MAX_TOKENIZER_BYTES = 256 << 20

_LEAST_TOKENS = 256
"""A tokenizer without ``tokenizer.json`` has at least one token per byte; with fewer, that file is missing."""


def load_tokenizer(source: str, options: ModelOptions, *, only_local: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer; if it has no padding token EOS is used, so that the vocabulary does not change.

    Args:
        source: folder or Hub id.
        options: its revision, and whether its code may run.
        only_local: do not ask the Hub.

    Raises:
        ValueError: it has no EOS token, which closes every readout; its chat template cannot be rendered within
            bounds; or it comes with code that is not trusted.
        OSError: the tokenizer does not exist.
    """
    named, source = source, locate_base(source, options, only_here=only_local)
    revision = revision_of(named, options)
    with nullcontext() if only_local else asking_hub(source), own_code_named(source, options):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=options.trust_remote_code, local_files_only=only_local
        )
    check_chat_template(tokenizer, source)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: must have an EOS token, which closes every readout, {source} has none. Set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(folder: Path, options: ModelOptions, *, otherwise: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer from an adapter's or an export's folder, or a fallback if there is none.

    Args:
        options: as for :func:`load_tokenizer`.
        otherwise: folder or Hub id of the fallback.

    Raises:
        ValueError: the folder's tokenizer is damaged or incomplete.
    """
    config = folder / _TOKENIZER_CONFIG
    if not config.exists():
        if (folder / _TOKENIZER).exists():
            raise ValueError(f"{config}: must be beside {_TOKENIZER}, but is missing. {AGAIN}")
        return load_tokenizer(otherwise, options)
    for path in folder.glob("*token*.json"):
        if (size := path.stat().st_size) > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"{path}: must be at most {_MAX_TOKENIZER_BYTES:,} bytes, got {size:,}. {AGAIN}")
    try:
        tokenizer = load_tokenizer(str(folder), options)
        tokenizer("")
    except Exception as error:  # from several libraries; one of them raises plain `Exception`
        for path in sorted(folder.glob("*token*.json")):
            read_object(path, max_bytes=_MAX_TOKENIZER_BYTES)
        if is_ours(error):
            raise
        raise ValueError(
            f"{folder}: its tokenizer ({_TOKENIZER}, {_TOKENIZER_CONFIG}) must be one that transformers can load, but "
            f"is not ({brief(error)}). {AGAIN}"
        ) from error
    if not (folder / _TOKENIZER).exists() and len(tokenizer) < _LEAST_TOKENS:
        raise ValueError(
            f"{folder}: its tokenizer must have tokens for any text, but has {len(tokenizer)} ({_TOKENIZER}, "
            f"{_TOKENIZER_CONFIG}). {AGAIN}"
        )
    return tokenizer
