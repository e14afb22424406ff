"""Campaign: command lines as people mistype them, each stopped by what it names before any model is trained."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from rim_peft.cli.main import COMMANDS, main
from rim_peft.demo import RECIPE as DEMO
from tests.robustness.judging import Case, unclear_text

_RECIPES = Path(__file__).parents[2] / "recipes"
_ODD = (
    *("", " ", "-", "--", "---", "~", "~nobody-here", "~/none-here", "none-here", "none/here", "../none-here", "é", "日本"),
    *("\x07", "a\nb", "'", '"', "%s", "{}", "--help=1", "0", "-1", "1e3", "nan", "inf", "9" * 400, "1.5", "true", "null"),
    *("x" * 3000, "\ud800", "/dev/null", "a=b", "=", "=1", "seed=", "seed=x", "seed=[", "adapter.r=.inf", "\u200b", "*"),
)  # fmt: skip
_OPTIONS = {
    "train": (),
    "evaluate": ("--task", "--split", "--data", "--limit", "--blocks", "--by-block", "--max-new-tokens", "--batch-size"),
    "generate": ("--blocks", "--max-new-tokens", "--batch-size", "--revision", "--base", "--json", "--trust-remote-code"),
    "check": ("--base", "--row-tokens", "--device", "--json"),
    "push": ("--private", "--revision", "--message", "--license", "--base"),
    "lm-eval": ("--tasks", "--blocks", "--limit", "--batch_size", "--seed", "--include_path", "--gen_kwargs"),
    "export": ("--out", "--format", "--blocks", "--dtype", "--max-shard-size", "--append-to", "--prompts", "--task"),
    "compare": ("--parallel", "--plan"),
    "ablate": ("--parallel", "--plan"),
    "demo": ("--rows", "--seed", "--json"),
    "bench": ("--list",),
}
_OVERRIDES = (
    *("seed=-1", "sed=1", "adapter.r=-1", "adapter.num_blocks=1000000000", "grounding.learning_rate=.nan", "data.task=x"),
    *("grounding=7", "model=null", "data.path=[1]", "evaluation.batch_size=0", "method=none", "output_dir=", "a.b.c=1"),
    *("adapter.r={a: 1", "adapter.r=!!python/name:os.system", "seed=" + "9" * 5000, "refinement.lr=1", "resume=maybe"),
)
"""Values with which no recipe can be trained."""


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield command lines with something wrong, and a few that ask for help."""
    rng = random.Random(f"command lines {seed}")
    places = _places(folder)
    while True:
        command = rng.choice([name for name in COMMANDS if name != "bench"])
        arguments = _arguments(rng, command, places)
        yield Case(f"{arguments!r}"[:700], lambda arguments=arguments: _run(arguments))


def _places(folder: Path) -> dict[str, str]:
    """Make files and folders that are none of what commands ask for."""
    (folder / "empty").mkdir()
    (folder / "no adapter").mkdir()
    (folder / "no adapter" / "adapter_config.json").write_text("{}")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "typo.yaml").write_text(DEMO.read_text(encoding="utf-8") + "sed: 1\n")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "recipe.yaml").write_text("")
    return {path.name: str(path) for path in folder.iterdir()}


def _arguments(rng: random.Random, command: str, places: dict[str, str]) -> list[str]:
    kind = rng.random()
    if kind < 0.05:
        return [rng.choice([*_ODD, command.upper(), f"{command}x"]), *rng.sample(_ODD, 2)]
    if kind < 0.1:
        return [command, *rng.sample(_ODD, rng.randrange(3)), "--help"]
    found: list[str] = [command]
    if command in ("train", "check"):
        recipe = rng.choice([str(DEMO), str(_RECIPES / "gsm8k" / "tiny.yaml")])
        found += [recipe, rng.choice(_OVERRIDES)] if rng.random() < 0.5 else [_odd(rng, places)]
    elif command in ("compare", "ablate"):
        found += [str(_RECIPES / "compare" / "demo.yaml"), rng.choice(("sed=1", "seeds=[]", "changes.adapter.r=-1", "methods=3"))]
        if rng.random() < 0.5:
            found[1:] = [_odd(rng, places)]
    elif command == "demo":
        found += ["--output", places["unfinished"], rng.choice(_OVERRIDES)]
    else:
        found += [_odd(rng, places)]
        found += {"push": ["owner/name"], "export": ["--out", places["empty"]], "lm-eval": ["--tasks", "x"]}.get(command, [])
        found += ["a question"] if command == "generate" else []
    for option in rng.sample(_OPTIONS[command], min(len(_OPTIONS[command]), rng.choice((0, 0, 1, 2)))):
        found += [option, rng.choice(_ODD)]
    if rng.random() < 0.3:
        found.insert(rng.randrange(1, len(found) + 1), rng.choice(_ODD))
    if rng.random() < 0.1:
        del found[rng.randrange(1, len(found))]
    return found


def _odd(rng: random.Random, places: dict[str, str]) -> str:
    return rng.choice([*places.values(), *_ODD])


def _run(arguments: Sequence[str]) -> str | None:
    """Run a command in this process; return what is wrong with how it ended."""
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch("sys.stdin", io.StringIO("")):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    text = err.getvalue()
    if code == 0:
        return None if "--help" in arguments or "-h" in arguments or not text.strip() else f"succeeds: {text[:300]}"
    if code not in (1, 2):
        return f"ends with {code!r}"
    if complaint := unclear_text(text, ()):
        return f"{complaint}: {text[-500:]}"
    if code == 2 and "usage:" not in text:
        return f"says wrong usage without the usage: {text[:300]}"
    return None
