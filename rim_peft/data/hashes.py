"""Hashes of what a tokenised table depends on: rows, tokenizer, code."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import sys
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from tokenizers import __version__ as tokenizers_version
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version


def source_hash(*modules: str) -> str:
    """Return a hash of the source of imported modules.

    ``datasets`` identifies a mapped function by its name. Pass this hash as an argument of the function, so that a
    change of its code invalidates cached results.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in modules:
        try:
            digest.update(inspect.getsource(sys.modules[name]).encode())
        except (OSError, TypeError):  # defined in a session or notebook; `datasets` hashes the code of such functions
            digest.update(name.encode())
    return digest.hexdigest()


def rows_hash(dataset: Dataset) -> str:
    """Return a hash of a table's columns, values and order.

    The fingerprint of ``datasets`` only describes how a table was made. A generator that reads a file, or a file with
    the same time stamp, can give different rows under the same fingerprint.
    """
    digest = hashlib.blake2b(repr(dataset.features).encode(), digest_size=16)
    # A selected or filtered dataset is a table plus indices into it.
    for table in (dataset.data, dataset._indices):
        for batch in table.to_batches() if table is not None else ():
            digest.update(batch.serialize())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of everything that token ids and rendered chats depend on; None if it cannot be determined.

    The tokenizer's path, padding and earlier use do not count, unless its class has its own encoding: then its whole
    pickled state counts.
    """
    kind = type(tokenizer)
    if "strftime_now" in str(tokenizer.chat_template):  # cached chats would keep the date of their first rendering
        return None
    try:
        content = _fast_content(tokenizer) if _is_plain(kind) else [Hasher.hash(tokenizer).encode()]
        code = [transformers_version, tokenizers_version, kind.__qualname__, source_hash(kind.__module__)]
    except Exception:  # a part is written in Python, or cannot be pickled
        return None
    return digest_of(" ".join(code).encode(), *content)


def digest_of(*parts: bytes) -> str:
    """Return a hash of several parts that also depends on where each part ends."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def _is_plain(kind: type) -> bool:
    """Tell whether a tokenizer class leaves encoding to the fast backend and chats to the template."""
    names = ("__call__", "_encode_plus", "apply_chat_template")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in names)


def _fast_content(tokenizer: Any) -> list[bytes]:
    # The whole backend would include its last padding and truncation settings.
    backend = tokenizer.backend_tokenizer
    parts = [backend.model, backend.normalizer, backend.pre_tokenizer, backend.post_processor]
    added = [backend.get_added_tokens_decoder(), tokenizer.split_special_tokens]
    special = [tokenizer.special_tokens_map, tokenizer.eos_token_id, tokenizer.chat_template]
    return [*(pickle.dumps(part) for part in parts), repr([added, special]).encode()]
