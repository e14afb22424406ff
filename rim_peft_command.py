"""The command ``rim-peft``: answers help, version and mistyped commands without delay.

This module is outside the package because importing the package imports PEFT and torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "train": "train an adapter from a recipe",
    "evaluate": "measure an adapter's accuracy on a task",
    "generate": "answer questions with an adapter",
    "inspect": "show what an adapter holds after each of its blocks",
    "app": "play with an adapter on a local page",
    "chains": "have a teacher write steps for rows that have none",
    "runs": "list the runs below a folder: state, accuracy, cost",
    "check": "check recipes before a run: errors, tokens, steps, memory",
    "push": "upload an adapter, with its recipe and its card, to the Hub",
    "lm-eval": "run tasks of EleutherAI's lm-evaluation-harness on an adapter",
    "export": "write an adapter as a model that runs without this package",
    "compare": "train methods side by side, measure them and write one report",
    "ablate": "compare variants of one recipe, each with one value changed",
    "demo": "train, evaluate and show the built-in example",
    "base": "fetch a base that recipes name, such as smollm2-135m",
    "cache": "show or clear the tokenised tables on this machine",
    "bench": "run the benchmarks from a clone of the repository",
}
"""Name and summary of each command; its module is ``rim_peft.cli.NAME``, with an underscore for a hyphen."""

EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted by SIGINT or SIGTERM"

LIGHT_COMMANDS = ("runs",)
"""Commands whose modules import neither PEFT nor torch."""

_LONGEST = 100


def main() -> int:
    """Run ``rim-peft`` with this process's arguments, and return its exit code."""
    arguments = sys.argv[1:]
    if not is_command(arguments) and all(_is_plain(argument) for argument in arguments):
        answer_without_command(arguments, command_list())
    if arguments and arguments[0] in LIGHT_COMMANDS:
        _skip_package()
    quiet_bitsandbytes()
    try:
        from rim_peft.cli.main import main as run

        return run(arguments)
    except KeyboardInterrupt:  # during the import, which takes seconds
        print("rim-peft: interrupted", file=sys.stderr)
        return 130


def quiet_bitsandbytes() -> None:
    """Let bitsandbytes, which PEFT imports, not begin with the kernels that it lacks on some processors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_command(arguments: Sequence[str]) -> bool:
    """Tell whether arguments begin with a command."""
    return bool(arguments) and arguments[0] in COMMANDS


def answer_without_command(arguments: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
    """Print help or version, or report what is wrong with arguments that do not begin with a command, and exit."""
    parser.parse_args(arguments)
    parser.error("the command must come first")


def command_list(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser that knows the names of the commands, not their arguments."""
    parser = parser_class(
        prog="rim-peft", description="Train and use language models that reason in memory blocks.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def _version() -> str:
    """Read the version from its file, since importing it would import the package."""
    package = find_spec("rim_peft")
    if package is None or package.origin is None:
        raise ImportError("the package rim_peft is missing beside the command rim-peft: install rim-peft again.")
    version: str = runpy.run_path(str(Path(package.origin).with_name("version.py")))["__version__"]
    return version


def _skip_package() -> None:
    """Let modules of the package be imported without running its ``__init__``, which imports PEFT and torch."""
    package = find_spec("rim_peft")
    if package is not None:
        sys.modules.setdefault("rim_peft", module_from_spec(package))


def _is_plain(argument: str) -> bool:
    """Tell whether a terminal can show an argument as it is; others need the full command to escape and cut them."""
    return argument.isascii() and argument.isprintable() and len(argument) <= _LONGEST


if __name__ == "__main__":
    sys.exit(main())
