"""Console output: results to stdout, everything else to stderr, and only relevant output of libraries."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from rim_peft.escaping import visible
from rim_peft.values import cut, expand_user, shown

if TYPE_CHECKING:
    from rim_peft.run import Run

_MOST = (1 << 32) - 1
_LONGEST_NAME = 255


def process_number() -> int:
    """Return this process's number among those that a launcher started; 0 is the one that reports."""
    return int(os.environ.get("RANK", "0"))


def use_utf8() -> None:
    """Read and write UTF-8, whatever the locale and ``PYTHONIOENCODING``; unencodable text is escaped."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")


def quiet_libraries() -> None:
    """Silence the libraries' notices, which would hide ours; their errors and our log lines go to stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns when a process forks
    warnings.simplefilter("ignore")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logging.getLogger("rim_peft").setLevel(logging.INFO if process_number() == 0 else logging.ERROR)


def quiet_model_loading() -> None:
    """Hide transformers' progress bars for reading a model's files; those of training stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def say(text: str) -> None:
    """Print text to stdout that may contain foreign names or texts; control characters are made visible."""
    print(visible(text), flush=True)  # at once in a pipe, too: a command may go on for hours


def complain(text: str) -> None:
    """Print such text to stderr."""
    print(visible(text), file=sys.stderr)


class _Visible(logging.Formatter):
    """Makes control characters visible: log lines contain names of files and their content."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Send printed output to stderr while entered, such as the Trainer's log lines."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def resumable(how: str | None) -> Iterator[None]:
    """Say how to resume what was stopped while entered; None says nothing. :func:`main` knows the exit codes."""
    from rim_peft.training.interruption import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt, SystemExit):
        if how is not None:
            complain(f"rim-peft: stopped; {how}")
        raise


OLD_OPTIONS = {
    "--blocks": "--num-blocks",
    "--data": "--data-path",
    "--out": "--output-dir",
    "--output": "--output-dir",
    "--rows": "--num-rows",
    "--window": "--window-tokens",
}
"""Old names of options; they still work."""


class ArgumentParser(argparse.ArgumentParser):
    """Parses a command's arguments; its errors stay readable, whatever was typed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, replacing old names of options by their new ones."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([*map(self._renamed, given[:end]), *given[end:]], namespace)

    def _renamed(self, argument: str) -> str:
        option, equals, value = argument.partition("=")
        new = OLD_OPTIONS.get(option)
        if new is None or option in self._option_string_actions or new not in self._option_string_actions:
            return argument
        print(f"rim-peft: {option} is {new} now.", file=sys.stderr)
        return f"{new}{equals}{value}"

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit."""
        super().error(cut(message))


def add_adapter_argument(parser: argparse.ArgumentParser, *, or_export: bool = False) -> None:
    """Add the argument of commands that take a training's adapter, or also an export."""
    made_by = "a training or an export" if or_export else "a training"
    parser.add_argument(
        "adapter", metavar="ADAPTER", type=path, help=f"output folder of {made_by}, or an adapter's folder or Hub id"
    )


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how an adapter answers."""
    parser.add_argument(
        "--num-blocks", type=positive, metavar="K", help="blocks after a prompt (default: the adapter's)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="maximum tokens of an answer (default: the recipe's)"
    )


def add_chain_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how the base writes its reasoning out."""
    parser.add_argument(
        "--chain-tokens", type=positive, metavar="N", help="maximum tokens of a chain (default: 256, or as many as fit)"
    )
    parser.add_argument(
        "--chain-template", metavar="TEXT", help="how the base is asked for it, with {question} (default: step by step)"
    )


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that load an adapter."""
    parser.add_argument("--revision", help="branch, tag or commit of an adapter on the Hub")
    parser.add_argument("--base", type=path, help="folder or Hub id of the base, if it is not where the adapter says")
    parser.add_argument(
        "--trust-remote-code",
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with the base or the tokenizer; files cannot switch this on",
    )


def load_run_of(args: argparse.Namespace) -> Run:
    """Load the adapter that a command's arguments name, without progress bars."""
    from rim_peft.run import load_run

    quiet_model_loading()
    return load_run(args.adapter, base=args.base, revision=args.revision, trust_remote_code=args.trust_remote_code)


def path(text: str) -> str:
    """Read a path or a Hub id; ``~`` is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if any(unicodedata.category(char) == "Cc" for char in text):
        raise argparse.ArgumentTypeError(f"must not hold control characters, got {shown(text)}")
    if any(len(part) > _LONGEST_NAME for part in text.split("/")):
        raise argparse.ArgumentTypeError(f"must hold names of at most {_LONGEST_NAME} characters, got {shown(text)}")
    try:
        os.fsencode(text)
        return expand_user(text)
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be the name of a file, got {shown(text)}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Read a number of at least 1."""
    return _number(text, least=1)


def not_negative(text: str) -> int:
    """Read a number of at least 0."""
    return _number(text, least=0)


def _number(text: str, *, least: int) -> int:
    if not re.fullmatch(r"-?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"must be an integer, got {shown(text)}")
    if text.startswith("-") or len(text) > len(str(_MOST)) or not least <= int(text) <= _MOST:
        limit = f"at least {least}" if text.startswith("-") or len(text) == 1 else f"at most {_MOST}"
        raise argparse.ArgumentTypeError(f"must be {limit}, got {cut(text, most=60)}")
    return int(text)
