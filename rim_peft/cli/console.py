"""What is written where: results to stdout, everything else to stderr, and of the libraries only what matters."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def process_number() -> int:
    """Return which of the processes this is that a launcher has started, 0 being the one that reports."""
    return int(os.environ.get("RANK", "0"))


def use_utf8() -> None:
    """Read and write UTF-8, whatever the locale and ``PYTHONIOENCODING`` say; what it cannot write is escaped."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")


def quiet_libraries() -> None:
    """Keep the libraries' notices from hiding ours; their errors and our log lines go to stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process forks
    warnings.simplefilter("ignore")
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.ERROR)
    logging.getLogger("rim_peft").setLevel(logging.INFO if process_number() == 0 else logging.ERROR)


def quiet_model_loading() -> None:
    """Leave out transformers' bars for reading a model's files; those of training stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """While entered, send what is printed to stderr, such as the Trainer's log lines."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
