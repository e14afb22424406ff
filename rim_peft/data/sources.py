"""Sources of rows: local paths, the Hub, and rows held out by a hash of their question.

The Hub is probed first, because its libraries retry each file and take a minute or more to give up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session

from rim_peft.data.examples import Question
from rim_peft.data.files import Rows, absent, kind_of, local_splits, own_name

_PATIENCE_SECONDS = 4.0
_ASK_AGAIN_SECONDS = 60.0

_failures: dict[str, tuple[float, str]] = {}
"""Addresses that did not answer, each with the time and the reason."""
_answered: set[str] = set()


def hub_problem() -> str | None:
    """Return why the Hub cannot be used: it is disabled or does not answer; None if it answers.

    The timeout is four seconds, or ``HF_HUB_ETAG_TIMEOUT``. Success is remembered for good, failure for a minute.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    address = str(constants.ENDPOINT)
    if address in _answered:
        return None
    failed, why = _failures.get(address, (-_ASK_AGAIN_SECONDS, ""))
    if time.monotonic() - failed < _ASK_AGAIN_SECONDS:
        return why
    if (found := _ask(address)) is None:
        _answered.add(address)
        return None
    _failures[address] = time.monotonic(), found
    return found


@contextmanager
def asking_hub(source: str) -> Iterator[str | None]:
    """Let the libraries read ``source`` inside this context, from their caches only if the Hub does not answer.

    Args:
        source: id on the Hub; the Hub is not probed for a local file or folder.

    Yields:
        Why the Hub is not used; None if it is.

    Raises:
        ConnectionError: the Hub is not used, and the source is not cached here.
    """
    # Sets the libraries' offline flags: their argument `local_files_only` does not cover all of their requests.
    problem = None if Path(source).exists() else hub_problem()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if problem is not None:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield problem
    except OSError as error:
        if problem is None or not source:
            raise
        raise ConnectionError(f"{source} is not on this machine, and {problem}") from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _ask(address: str) -> str | None:
    """Return why an address does not answer; None if it gives any answer."""
    own = "HF_HUB_ETAG_TIMEOUT" in os.environ
    patience = float(constants.HF_HUB_ETAG_TIMEOUT) if own else _PATIENCE_SECONDS
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(address, timeout=patience)
            outcome.append(None)
        except Exception as error:  # the HTTP client, and so its errors, depend on the version of huggingface_hub
            outcome.append(str(error).partition("\n")[0] or type(error).__name__)

    # In a thread, since a DNS lookup has no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience + 0.5)
    why = outcome[0] if outcome else f"no answer within {patience:g} s"
    return None if why is None else f"the Hub ({address}) cannot be reached: {why}"


def question_hash(question: Question, *, salt: str) -> float:
    """Return a number in [0, 1) that depends only on the question's text and ``salt``.

    >>> round(question_hash("1 + 1?", salt="validation"), 6)
    0.609109
    """
    text = question if isinstance(question, str) else json.dumps(list(question), ensure_ascii=False, sort_keys=True)
    digest = hashlib.blake2b(f"{salt}\n{text.strip()}".encode(), digest_size=8).digest()
    # Only the upper 53 bits, the precision of a float: 2**64 - 1 would round up to 1.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def shared_questions(first: Dataset, second: Dataset) -> list[Question]:
    """Return the questions of ``first`` that are also in ``second``, to check that two splits are disjoint.

    White space around a question is ignored, and so are rows without a question.

    >>> shared_questions(Dataset.from_dict({"question": ["a", "b"]}), Dataset.from_dict({"question": ["b ", None]}))
    ['b']
    """
    there = {question_hash(question, salt="same") for question in second["question"] if question is not None}
    asked = [question for question in first["question"] if question is not None]
    return [question for question in asked if question_hash(question, salt="same") in there]


def hold_out(dataset: Dataset, size: int | float) -> tuple[Dataset, Dataset]:
    """Split rows into training rows and held-out rows, which never share a question.

    Turns of one conversation, in rows with the column ``conversation``, count as one question. The choice depends on
    the texts of the questions, not on their order, so it is the same in every run. Rows that could not be read stay in
    training, where they are reported.

    >>> train, held_out = hold_out(Dataset.from_dict({"question": ["a", "b", "c", "b"]}), 2)
    >>> train["question"][:], held_out["question"][:]
    (['c'], ['a', 'b', 'b'])

    Args:
        dataset: rows with ``question``.
        size: questions to hold out: a number (int) or a share in (0, 1) (float).

    Returns:
        The training rows and the held-out rows, both in their old order.

    Raises:
        ValueError: ``size`` would leave a part empty, or the dataset is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset: must be a Dataset to hold rows out of, got {type(dataset).__name__}. Load it without streaming."
        )
    questions = dataset["question"]
    if CONVERSATION in dataset.column_names:
        pairs = zip(dataset[CONVERSATION], questions, strict=True)
        questions = [question if conversation is None else conversation for conversation, question in pairs]
    hashes = [None if question is None else question_hash(question, salt="hold-out") for question in questions]
    ranked = sorted({value for value in hashes if value is not None})
    count = size if isinstance(size, int) else round(size * len(ranked))
    if not 0 < count < len(ranked):
        raise ValueError(
            f"size: must hold out at least one of {len(ranked)} questions and leave at least one, got {size!r}. "
            "Give a number of questions, or a share between 0 and 1."
        )
    held: set[Any] = set(ranked[:count])
    return (
        dataset.select([index for index, value in enumerate(hashes) if value not in held]),
        dataset.select([index for index, value in enumerate(hashes) if value in held]),
    )


_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")

CONVERSATION = "conversation"
"""Column of rows that are turns of conversations: what the turns of one conversation share."""

_NO_NAMES: Mapping[str, str] = {}


def find_splits(
    path: str,
    *,
    prefix: str = "",
    streaming: bool = False,
    names: Mapping[str, str] = _NO_NAMES,
    lines_per_row: int = 1,
) -> dict[str, Callable[[], Rows]]:
    """Find the splits of a source, each as a function that opens it.

    Rows of JSON, CSV and TSV files have the column ``json`` with their text, so that a malformed row is only one bad
    row. Rows of text files have the column ``text``: one line, or several joined by newlines. All these also have their
    place in the file, and the error if they could not be read (:mod:`rim_peft.data.lines`). Other sources have their
    own columns.

    Args:
        path: a file, a folder with files named after splits (in it or in its folder ``data``), a folder written by
            ``save_to_disk``, or a Hub id as ``owner/name`` or ``owner/name:config``.
        prefix: word that may precede the split in file names, as in ``prosqa_train.json``.
        names: names for splits that should not have :func:`split_name`'s; keyed by the source's name or by
            :func:`split_name`'s.
        lines_per_row: number of lines of a text file per row, including empty lines.

    Returns:
        Functions that open the splits, by name: ``train``, ``validation``, ``test``, or the name in the source. A
        single file that is not named after a split counts as ``train``. Case in file names does not matter.

    Raises:
        FileNotFoundError: nothing was found; says what was looked for and what is there.
        ValueError: a file cannot be read as its suffix says.
        ConnectionError: the Hub cannot be reached.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local_splits(local, prefix=prefix, streaming=streaming, names=names, lines_per_row=lines_per_row)
    hub = _HUB_ID.fullmatch(path)
    if hub is None or path.startswith(".") or kind_of(local) is not None:
        raise FileNotFoundError(absent(local))
    found_there = _open_hub(path, hub["id"], hub["config"], streaming)
    return {own_name(name, names): partial(_same, rows) for name, rows in found_there.items()}


def _open_hub(path: str, hub_id: str, config: str | None, streaming: bool) -> Mapping[str, Rows]:
    try:
        with asking_hub(hub_id):
            splits = load_dataset(hub_id, config, streaming=streaming)
    except (OSError, ValueError, DatasetGenerationError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else FileNotFoundError
        raise kind(
            f"path: {path} is not a local file or folder, and cannot be read from the Hub: {error}. Give a local "
            "folder with files named after splits (train.jsonl, valid.json, test.parquet), or a Hub id as owner/name "
            "or owner/name:config."
        ) from error
    return {str(name): rows for name, rows in splits.items()}


def _same(rows: Rows) -> Rows:
    return rows
