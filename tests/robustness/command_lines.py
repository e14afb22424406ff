"""Campaign: command lines as people mistype them, each stopped by what it names before any model is trained."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from rim_peft.cli.main import main
from rim_peft.demo import RECIPE as DEMO
from rim_peft_command import COMMANDS
from tests.robustness.judging import Case, RefusedError

_RECIPES = Path(__file__).parents[2] / "recipes"
_ODD = (
    *("", " ", "-", "--", "---", "~", "~nobody-here", "~/none-here", "none-here", "none/here", "../none-here", "é"),
    *("日本", "\x07", "a\nb", "'", '"', "%s", "{}", "--help=1", "0", "-1", "1e3", "nan", "inf", "9" * 400, "1.5"),
    *("true", "null", "x" * 3000, "\ud800", "/dev/null", "a=b", "=", "=1", "seed=", "seed=x", "seed=[", "\u200b", "*"),
)
_OPTIONS = {
    "evaluate": (
        "--task",
        "--split",
        "--data-path",
        "--limit",
        "--num-blocks",
        "--by-block",
        "--max-new-tokens",
        "--text",
        "--window-tokens",
    ),
    "generate": ("--num-blocks", "--max-new-tokens", "--batch-size", "--revision", "--base", "--trust-remote-code"),
    "inspect": ("--out", "--donor", "--num-blocks", "--max-new-tokens", "--num-best", "--seed", "--chain-tokens"),
    "check": ("--base", "--row-tokens", "--device", "--json"),
    "push": ("--private", "--revision", "--message", "--license", "--base"),
    "export": (
        "--output-dir",
        "--format",
        "--num-blocks",
        "--dtype",
        "--max-shard-size",
        "--append-to",
        "--prompts",
        "--task",
    ),
    "chains": ("--url", "--timeout", "--template", "--examples", "--temperature", "--top-p", "--split-steps", "--keep"),
    "compare": ("--parallel", "--plan", "--report"),
    "ablate": ("--parallel", "--plan"),
    "demo": ("--num-rows", "--seed", "--json"),
}
_OVERRIDES = (
    *("seed=-1", "sed=1", "adapter.r=-1", "adapter.num_blocks=1000000000", "grounding.learning_rate=.nan"),
    *("grounding=7", "model=null", "data.path=[1]", "evaluation.batch_size=0", "method=none", "data.task=x"),
    *("adapter.r={a: 1", "adapter.r=!!python/name:os.system", f"seed={'9' * 5000}", "refinement.lr=1"),
    *("output_dir=", "a.b.c=1", "resume=maybe"),
)
"""Values with which no recipe can be trained."""


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield command lines with something wrong, and a few that ask for help."""
    rng = random.Random(f"command lines {seed}")
    places = _places(folder)
    while True:
        command = rng.choice(
            [name for name in COMMANDS if name not in ("bench", "lm-eval")]
        )  # which look for others' files
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
        found += [
            str(_RECIPES / "compare" / "demo.yaml"),
            rng.choice(("sed=1", "seeds=[]", "changes.adapter.r=-1", "methods=3")),
        ]
        if rng.random() < 0.5:
            found[1:] = [_odd(rng, places)]
    elif command == "demo":
        found += ["--output-dir", places["unfinished"], rng.choice(_OVERRIDES)]
    else:
        found += [_odd(rng, places)]
        found += {"push": ["owner/name"], "export": ["--output-dir", places["empty"]], "lm-eval": ["--tasks", "x"]}.get(
            command, []
        )
        found += ["--teacher", "none/here", "--output-dir", places["unfinished"]] if command == "chains" else []
        found += ["a question"] if command in ("generate", "inspect") else []
    options = _OPTIONS.get(command, ())
    for option in rng.sample(options, min(len(options), rng.choice((0, 0, 1, 2)))):
        found += [option, rng.choice(_ODD)]
    if rng.random() < 0.3:
        found.insert(rng.randrange(1, len(found) + 1), rng.choice(_ODD))
    if rng.random() < 0.1 and command in ("evaluate", "generate", "push", "export"):  # others would begin to train
        del found[rng.randrange(1, len(found))]
    return found


def _odd(rng: random.Random, places: dict[str, str]) -> str:
    return rng.choice([*places.values(), *_ODD])


def _run(arguments: Sequence[str]) -> str | None:
    """Run a command in this process; return what is wrong with how it ended.

    Raises:
        RefusedError: it was refused, with what the command wrote to stderr.
    """
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch("sys.stdin", io.StringIO("")),
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
    ):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    text = err.getvalue()
    if code == 0:
        shows = "--help" in arguments or arguments[0] in ("base", "cache", "runs")  # which list what is there
        return None if shows else f"succeeds: {text[:300]}"
    if code not in (1, 2):
        return f"ends with {code!r}"
    if code == 2 and "usage:" not in text:
        return f"says wrong usage without the usage: {text[:300]}"
    if code == 1 and "--json" in arguments and not text:
        text = "\n".join(error for report in json.loads(out.getvalue())["recipes"] for error in report["errors"])
    raise RefusedError(text)
