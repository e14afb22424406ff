"""``rim-peft``: find the command, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType, ModuleType
from typing import Any, TypeGuard

from rim_peft.cli.console import ArgumentParser, complain, process_number, quiet_libraries, use_utf8
from rim_peft.values import cut
from rim_peft_command import COMMANDS, answer_without_command, command_list, is_command

_LONGEST_LINE = 1000
"""Maximum characters of an error line shown in full; longer ones contain a value that nobody reads."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    use_utf8()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not is_command(arguments):
        answer_without_command(arguments, command_list(ArgumentParser))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1 and arguments[0] != "train":
        command_list(ArgumentParser).error(
            f"{arguments[0]} runs in one process, got {num_processes}: start it without a launcher"
        )
    args = argparse.Namespace(traceback=True)  # an error before there are arguments is one of this package
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        # Intermixed, since a question or overrides may come after an option.
        args = _command_parser(arguments[0]).parse_intermixed_args(arguments[1:])
        quiet_libraries()
        return args.run(args)
    except KeyboardInterrupt:
        print("rim-peft: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the output has gone; Python would complain again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if _is(error, "rim_peft.training.interruption", "Interrupted"):  # the command has said how to resume
            return 128 + error.signal_number
        if args.traceback:
            raise
        if process_number() == 0 or not _is_of_recipe(error):  # recipe errors are the same in all processes
            complain(_describe(error))
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command; only the command's own module is imported.

    The module has ``add_arguments(parser)``, ``run(args) -> int`` and optionally ``more_help() -> str`` for ``--help``.
    """
    summary = COMMANDS[name]
    module = import_module(f"rim_peft.cli.{name.replace('-', '_')}")
    parser = ArgumentParser(prog=f"rim-peft {name}", description=f"{summary[0].upper()}{summary[1:]}.", add_help=False)
    module.add_arguments(parser)
    parser.add_argument("-h", "--help", action=_Help, module=module, help="show this message and exit")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(run=module.run)
    return parser


def _describe(error: Exception) -> str:
    if _is_of_recipe(error):
        return str(error)  # each line already names its place
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    where = f" in process {process_number()}" if process_number() else ""
    message = "\n".join(line if len(line) <= _LONGEST_LINE else cut(line) for line in str(error).splitlines())
    return f"rim-peft: error{where}: {kind}{message}"


def _is_of_recipe(error: Exception) -> bool:
    return _is(error, "rim_peft.recipe", "RecipeError")


def _is(error: Exception, module: str, name: str) -> TypeGuard[Any]:
    """Tell whether an error is of a class, without importing its module for commands that do not."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


class _Help(argparse.Action):
    """``--help`` with the text of a command's ``more_help()``, which is built only on request."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, module: ModuleType, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, **kwargs)
        self._module = module

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        parser.print_help()
        if hasattr(self._module, "more_help"):
            print(f"\n{self._module.more_help()}")
        parser.exit()


def _stop(number: int, frame: FrameType | None) -> None:
    print("rim-peft: terminated", file=sys.stderr)
    raise SystemExit(128 + number)
