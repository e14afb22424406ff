"""Checks of documented code without running it: commands by the command line's own parsers, recipes by theirs."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command_parser

from rim_peft.chains.options import ChainOptions
from rim_peft.cli.chains import _read_overrides
from rim_peft.cli.evaluate import _check_together
from rim_peft.cli.main import _command_parser
from rim_peft.comparison.document import RESULTS
from rim_peft.comparison.plan import plan_runs
from rim_peft.comparison.reading import check_runs, load_comparison
from rim_peft.comparison.report.assembly import build_report
from rim_peft.demo import RECIPE as DEMO
from rim_peft.demo import showcase
from rim_peft.recipe import load_recipe
from rim_peft_command import COMMANDS

NEEDS = {
    "gpu": "a GPU",
    "hub": "the Hub, with an account where something is written",
    "engine": "another program, such as a server",
    "data": "the reader's own rows, adapter, base or code",
}
"""What a block may need that a test does not have."""

_ROOT = Path(__file__).parents[1]
_OWN_PATH = re.compile(r"(?:benchmarks|docs|examples|recipes|rim_peft|tests)/\S+")
_OVERRIDE = re.compile(r"[\w.]+=")
_OWN_RECIPE = ["data.task=rows", "data.options={}", "data.path=rows.jsonl"]
"""What makes the demo's recipe one for the reader's rows, as which RECIPE in a command is read."""


def check_code(language: str, code: str, needs: Sequence[str]) -> None:
    """Check a block.

    Args:
        language: what its fence says, or "text".
        code: the lines inside.
        needs: which of :data:`NEEDS` it has; their absence is no problem then.

    Raises:
        ValueError: the language is unknown, or something in the code is not what the package knows.
        OSError: a file that it names cannot be read.
        SyntaxError: it is no Python.
    """
    if language not in _CHECKS:
        raise ValueError(f"the language of a block must be one of {', '.join(_CHECKS)} or none, got {language!r}.")
    _CHECKS[language](code, needs)


def _check_text(code: str, needs: Sequence[str]) -> None:
    """Check the commands in a drawing or in output: they follow ``$``."""
    for line in code.splitlines():
        if re.match(r"(rim-peft|make|pip|python) ", line):
            raise ValueError(f"commands must be in a block of bash or follow '$ ', got {line!r}.")
        if line.startswith("$ "):
            _check_bash(line.removeprefix("$ "), needs)


def _check_json(code: str, needs: Sequence[str]) -> None:
    """Check a document, or one for each line."""
    try:
        json.loads(code)
    except json.JSONDecodeError:
        for line in code.splitlines():
            json.loads(line)


def _check_python(code: str, needs: Sequence[str]) -> None:
    """Check syntax, and that what is imported from the package is there."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for name in names:
            if (module or name).split(".")[0] == "rim_peft":
                _check_import(module or name, name if module else None)


def _check_import(module: str, name: str | None) -> None:
    try:
        found = import_module(module)
        if name is not None and not hasattr(found, name):
            import_module(f"{module}.{name}")
    except ImportError as error:
        raise ValueError(f"imports must exist: {error}.") from None


def _check_yaml(code: str, needs: Sequence[str]) -> None:
    """Check a recipe, a comparison's recipe, sections of a recipe, or a file of accelerate or the harness."""
    keys = yaml.safe_load(code)
    if not isinstance(keys, dict):
        raise ValueError(f"YAML must hold keys with values, got {keys!r}.")
    if "distributed_type" in keys or "doc_to_text" in keys:
        return
    if "output_dir" not in keys and "recipe" not in keys:
        load_recipe(DEMO, [*_OWN_RECIPE, *_as_overrides(keys)])
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(code, encoding="utf-8")
        _load(str(path), (), needs)


def _as_overrides(keys: dict[str, Any]) -> Iterator[str]:
    for name, value in keys.items():
        inside = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        for key, one in inside.items():
            yield f"{key}={json.dumps(one)}"


def _load(path: str, overrides: Sequence[str], needs: Sequence[str], *, kind: str | None = None) -> None:
    """Read a recipe or a comparison's; with its runs, unless it names what only the reader has."""
    if path == "RECIPE":
        load_recipe(DEMO, [*_OWN_RECIPE, *overrides])
        return
    keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if "recipe" not in keys:
        if kind is not None:
            raise ValueError(f"{path}: must be the recipe of a comparison for rim-peft {kind}.")
        load_recipe(path, overrides)
        return
    comparison = load_comparison(path, overrides)
    if kind is not None and comparison.kind != kind:
        raise ValueError(f"{path}: is for rim-peft {comparison.kind}, not for rim-peft {kind}.")
    if "data" not in needs:
        check_runs(comparison, plan_runs(comparison))


def _check_bash(code: str, needs: Sequence[str]) -> None:
    """Check each command: its program, its options, the values of recipes, and the repository's files that it names."""
    for words in _commands(code):
        for word in words:
            path = word.partition("=")[2] or word
            if _OWN_PATH.fullmatch(path) and not (_ROOT / path).exists():
                raise ValueError(f"{path} must be in the repository. Correct the command.")
        program, *arguments = words
        if program in _PROGRAMS:
            _PROGRAMS[program](arguments, needs)
        elif "engine" not in needs and program not in _PLAIN and not program.startswith(".venv/bin/"):
            known = ", ".join((*_PROGRAMS, *_PLAIN))
            raise ValueError(f"{program}: must be one of {known}, or the block marked <!-- needs: engine -->.")


def _commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command, without redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        is_command = True
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "|", ";"):
                if words:
                    yield words
                words, is_command = [], True
            elif word in ("<", ">", ">>", "2>"):
                is_command = False
            elif is_command:
                words.append(word)


def _check_rim_peft(arguments: Sequence[str], needs: Sequence[str]) -> None:
    command, *rest = arguments
    if command in ("--help", "--version"):
        return
    args = _parse(_parser(command).parse_intermixed_args, rest)
    if command == "train":
        _load(args.recipe, args.overrides, needs)
    elif command == "check":
        overrides = [text for text in args.recipes if _OVERRIDE.match(text)]
        for path in (text for text in args.recipes if text not in overrides):
            _load(path, overrides, needs)
    elif command in ("compare", "ablate"):
        if args.report:
            build_report(json.loads((Path(args.recipe) / RESULTS).read_text(encoding="utf-8")))
        else:
            _load(args.recipe, args.overrides, needs, kind=command)
    elif command == "demo":
        showcase.demo_recipe(Path(args.output_dir), seed=args.seed, overrides=args.overrides)
    elif command == "chains":
        ChainOptions(**{name: getattr(args, name) for name in ChainOptions.__dataclass_fields__})
        _read_overrides(args)
    elif command == "evaluate" and all(Path(text).exists() for text in args.text or []):
        _check_together(args)


@cache
def _parser(command: str) -> Any:
    if command not in COMMANDS:
        raise ValueError(f"rim-peft {command}: the command must be one of {', '.join(COMMANDS)}.")
    return _command_parser(command)


def _parse(parse: Callable[[list[str]], Namespace], arguments: Sequence[str]) -> Namespace:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            found = parse(list(arguments))
    except SystemExit:
        raise ValueError(f"{printed.getvalue().strip().splitlines()[-1]}") from None
    if printed.getvalue():  # an old name of an option
        raise ValueError(printed.getvalue().strip())
    return found


def _check_make(arguments: Sequence[str], needs: Sequence[str]) -> None:
    text = (_ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} *[:?]?=" if is_variable else rf"^{re.escape(name)}:(?!=)"
        if not re.search(pattern, text, re.MULTILINE):
            raise ValueError(f"make {word}: must be in the Makefile.")


def _check_pip(arguments: Sequence[str], needs: Sequence[str]) -> None:
    extras = (_ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    for name in (name for word in arguments for listed in re.findall(r"\[(.*)\]", word) for name in listed.split(",")):
        if not re.search(rf"^{re.escape(name.strip())} = \[", extras, re.MULTILINE):
            raise ValueError(f"{name}: must be an extra of pyproject.toml.")


def _check_python_command(arguments: Sequence[str], needs: Sequence[str]) -> None:
    first, second = (*arguments, "", "")[:2]
    if first == "-c":
        _check_python(second, needs)
    elif first == "-m" and "engine" not in needs and not _is_module(second):
        raise ValueError(f"python -m {second}: the module must exist.")
    elif first == "-m" and second == "rim_peft":
        _check_rim_peft(arguments[2:], needs)
    elif not first.startswith("-") and "engine" not in needs and not (_ROOT / first).is_file():
        raise ValueError(f"python {first}: the script must be in the repository.")


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _check_accelerate(arguments: Sequence[str], needs: Sequence[str]) -> None:
    """Check both parts of ``accelerate launch ... -m rim_peft ...``."""
    _parse(launch_command_parser().parse_args, arguments[1:])
    if "rim_peft" in arguments:
        _check_rim_peft(arguments[arguments.index("rim_peft") + 1 :], needs)


def check_inline(command: str) -> None:
    """Check a command in a sentence, which may be a part of one: its name and its options.

    Raises:
        ValueError: one of them does not exist.
    """
    _, name, *words = re.split(r"\s+", command)
    if name.startswith("-"):
        return
    known = {
        option
        for one in ([_parser(name)] if name not in ("...", "COMMAND") else [])
        for option in one._option_string_actions
    }
    for word in words:
        option = word.strip("[]").partition("=")[0]
        if option.startswith("--") and option not in known:
            raise ValueError(f"{option} must be an option of rim-peft {name}.")


_PROGRAMS: dict[str, Callable[[Sequence[str], Sequence[str]], None]] = {
    "rim-peft": _check_rim_peft,
    "make": _check_make,
    "pip": _check_pip,
    "python": _check_python_command,
    "accelerate": _check_accelerate,
}
_PLAIN = ("bash", "source", "cmp")
"""Programs of which only the repository's files among their arguments are checked."""
_CHECKS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "text": _check_text,
    "bash": _check_bash,
    "python": _check_python,
    "yaml": _check_yaml,
    "json": _check_json,
}
