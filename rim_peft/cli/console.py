"""What is written where: results to stdout, everything else to stderr, and of the libraries only what matters."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from rim_peft.escaping import visible


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logging.getLogger("rim_peft").setLevel(logging.INFO if process_number() == 0 else logging.ERROR)


def quiet_model_loading() -> None:
    """Leave out transformers' bars for reading a model's files; those of training stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def say(text: str) -> None:
    """Print to stdout what may hold names and texts of others, on which the terminal must not act."""
    print(visible(text))


def complain(text: str) -> None:
    """Print the same to stderr."""
    print(visible(text), file=sys.stderr)


class _Visible(logging.Formatter):
    """Log lines hold names of files, and of what is in them."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """While entered, send what is printed to stderr, such as the Trainer's log lines."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
