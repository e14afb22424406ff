"""What cached results depend on: code, rows and tokenizer, each as a hash."""

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
    """Return a hash of imported modules' source texts.

    ``datasets`` knows a mapped function by its name. With this among the function's arguments a result from the cache
    is never older than the code that would make it.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in modules:
        try:
            digest.update(inspect.getsource(sys.modules[name]).encode())
        except (OSError, TypeError):  # typed into a session or a notebook: such functions are known by their code
            digest.update(name.encode())
    return digest.hexdigest()


def rows_hash(dataset: Dataset) -> str:
    """Return a hash of a table's columns, values and order.

    The fingerprint that ``datasets`` keeps is one of how a table was made: a generator that reads a file, or a file
    with the same time stamp, gives other rows under the same one.
    """
    digest = hashlib.blake2b(repr(dataset.features).encode(), digest_size=16)
    # Rows that were selected or filtered are a table and indices into it.
    for table in (dataset.data, dataset._indices):
        for batch in table.to_batches() if table is not None else ():
            digest.update(batch.serialize())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of what token ids and rendered chats depend on; None if that cannot be known.

    Where a tokenizer lies, how it pads and what it was used for do not count, unless its class encodes in a way of its
    own: then all that can be pickled counts.
    """
    kind = type(tokenizer)
    if "strftime_now" in str(tokenizer.chat_template):  # chats would keep the day on which they were first rendered
        return None
    try:
        content = _fast_content(tokenizer) if _is_plain(kind) else [Hasher.hash(tokenizer).encode()]
        code = [transformers_version, tokenizers_version, kind.__qualname__, source_hash(kind.__module__)]
    except Exception:  # a part is written in Python, or holds what cannot be pickled
        return None
    return digest_of(" ".join(code).encode(), *content)


def digest_of(*parts: bytes) -> str:
    """Return a hash of several parts, which differs if bytes move from one to the next."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def _is_plain(kind: type) -> bool:
    """Tell whether a tokenizer's class leaves texts to a fast backend, and chats to their template."""
    names = ("__call__", "_encode_plus", "apply_chat_template")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in names)


def _fast_content(tokenizer: Any) -> list[bytes]:
    # The backend as a whole would hold how it last padded and truncated too.
    backend = tokenizer.backend_tokenizer
    parts = [backend.model, backend.normalizer, backend.pre_tokenizer, backend.post_processor]
    added = [backend.get_added_tokens_decoder(), tokenizer.split_special_tokens]
    special = [tokenizer.special_tokens_map, tokenizer.eos_token_id, tokenizer.chat_template]
    return [*(pickle.dumps(part) for part in parts), repr([added, special]).encode()]
