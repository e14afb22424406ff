"""Campaign: recipes of runs and comparisons as people mistype them, or bring them along from other tools."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rim_peft.comparison.plan import plan_runs
from rim_peft.comparison.reading import check_runs, load_comparison
from rim_peft.demo import RECIPE as DEMO
from rim_peft.recipe import load_recipe
from rim_peft.recipe.checks import all_keys
from rim_peft.recipe.reading import differing_keys, resolve
from rim_peft.recipe.syntax import read_yaml, write_yaml
from tests.robustness.judging import Case

_FOLDER = Path(__file__).parents[2] / "recipes"
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 10**9, 10**19, 10**400, -(10**18), 0.5, 1e30, -1e-30, 1.0),
    *(
        math.inf,
        -math.inf,
        math.nan,
        "",
        " ",
        "null",
        "1e-4",
        "no",
        "yes",
        "auto",
        "~",
        "~/x",
        "~nobody-here/x",
        "\x1b",
    ),
    *("a\nb", "é", "日本", "<script>", "{question}", "{a}{b}", "%s", "x" * 5000, "../../etc", "no_module:Class"),
    *([], [1], [[]], [None], ["a", 1], [1e99], {}, {"a": 1}, {"a": {"b": [1, {"c": None}]}}, {1: 2}, {None: 1}),
)
_FOREIGN = (
    {"base_model": "x", "load_in_4bit": True, "datasets": [{"path": "x", "type": "alpaca"}], "sequence_len": 512},
    {"model_name_or_path": "x", "stage": "sft", "finetuning_type": "lora", "cutoff_len": 512, "lora_target": "all"},
    {"model": {"_component_": "torchtune.models.lora", "lora_rank": 8}, "epochs": 3, "optimizer": {"lr": 1e-4}},
    {"max_seq_length": 2048, "r": 16, "lora_alpha": 16, "per_device_train_batch_size": 2, "bf16": True},
    {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2},
)
_TEXTS = (
    *("", "\n", "- a\n", "just text", "a: [1, 2", "a: b: c", "\t- x", "---\na: 1\n---\nb: 2\n", "{"),
    *("%YAML 9.9\n---\na: 1", "a: !!python/name:os.system x", "a: !x y", "a: &b c\nd: *e", "a: &b [*b]"),
    *("? [1]\n: 2", "a: 'x", "a: 1\na: 2"),
    *("\ufeffoutput_dir: x", "a: \x00", "a: !!int x", "a: !!float y", "a: '\\ud800'", 'a: "\\ud800"', "a: |\n  b\n c"),
    *("a: " + "[" * 60 + "]" * 60, "a: " + "9" * 5000, "<<: {a: 1}", "a: !!binary x", "a: !!set {b}", "a: 2024-01-01"),
)  # fmt: skip

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield recipes: whole ones with a mutation or a few, texts that are none, and comparisons."""
    rng = random.Random(f"recipes {seed}")
    paths = [DEMO, *sorted(_FOLDER.glob("[!ac]*/*.yaml"))]
    recipes = [read_yaml(path.read_text(encoding="utf-8")) for path in paths]
    comparisons = [read_yaml(path.read_text(encoding="utf-8")) for path in sorted((_FOLDER / "compare").glob("*.yaml"))]
    shutil.copyfile(DEMO, folder / "shared.yaml")
    for number in range(1 << 30):
        kind = rng.random()
        path = folder / f"case-{number % 50}.yaml"
        if kind < 0.06:
            yield _raw_case(f"{number}", path, _raw(rng, recipes))
        elif kind < 0.13:
            values = {**copy.deepcopy(rng.choice(comparisons)), "recipe": str(folder / "shared.yaml")}
            if kind < 0.12:
                _mutate(rng, values, _COMPARISON_KEYS)
            yield _case(f"{number} comparison", path, values, _run_comparison)
        else:
            values = copy.deepcopy(rng.choice(recipes))
            keys = all_keys()
            for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
                _mutate(rng, values, keys)
            yield _case(f"{number} recipe", path, values, _run)


_COMPARISON_KEYS = [
    *("seeds", "reference", "methods", "grid", "changes", "output_dir", "recipe", "test.split", "test.rows"),
    *("test.options", "selection.split", "test.path", "measures.budget", "measures.of", "measures.blocks"),
    *("measures.latency_batch_sizes", "methods.rim.changes", "methods.rim.search", "methods.x.same_compute_as"),
    *("methods.x.train", "methods.rim.seeds", "changes.adapter.r", "grid.adapter.r", "methods.rim.label"),
]


def _case(name: str, path: Path, values: Any, run: Callable[[Path], str | None]) -> Case:
    text = _dump(values)

    def write_and_run() -> str | None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return run(path)

    return Case(f"{name}: {text[-400:]!r}", write_and_run, names=(path.name, "command line", "shared.yaml"))


def _raw_case(name: str, path: Path, content: bytes) -> Case:
    def write_and_run() -> str | None:
        path.write_bytes(content)
        return _run(path)

    return Case(f"{name} text: {content[:200]!r}", write_and_run, names=(path.name,))


def _run(path: Path) -> str | None:
    """Read a recipe; one that is accepted must give its configurations, and be the same when it is written down."""
    recipe = load_recipe(path)
    recipe.rim_config()
    recipe.stage_trainers(anywhere=True)
    recipe.task()
    resolved = resolve(recipe)
    if differing := differing_keys(read_yaml(write_yaml(resolved)), resolved):
        return f"is another recipe once it is written: {differing}"
    return None


def _run_comparison(path: Path) -> str | None:
    comparison = load_comparison(path)
    check_runs(comparison, plan_runs(comparison))
    return None


def _raw(rng: random.Random, recipes: list[Any]) -> bytes:
    if rng.random() < 0.5:
        return rng.choice(_TEXTS).encode("utf-8", errors="surrogatepass")
    content = bytearray(write_yaml(rng.choice(recipes)).encode())
    for _ in range(rng.choice((1, 1, 3, 30))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])


def _mutate(rng: random.Random, values: dict[str, Any], keys: list[str]) -> None:
    """Change one thing in place."""
    inside = _pick_section(rng, values)
    action = rng.randrange(7)
    if action == 0 and inside:
        del inside[rng.choice(list(inside))]
    elif action == 1 and inside:
        inside[rng.choice(list(inside))] = _value(rng)
    elif action == 2 and inside:
        name = str(rng.choice(list(inside)))
        inside[_misspell(rng, name)] = inside.get(name)
    elif action == 3:
        _set(values, rng.choice(keys), _value(rng))
    elif action == 4 and inside:
        name = rng.choice(list(inside))
        inside[name] = {name: inside[name]} if rng.random() < 0.5 else [inside[name]]
    elif action == 5:
        values.update(copy.deepcopy(rng.choice(_FOREIGN)))
    elif inside:
        name = rng.choice(list(inside))
        if isinstance(inside[name], int | float):
            inside[name] = inside[name] * rng.choice((-1, 10, 1000, 10**9, 1e-9, 1e30, 0, 0.1))
        else:
            inside[name] = _value(rng)


def _pick_section(rng: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    sections += [inside for section in sections[1:] for inside in section.values() if isinstance(inside, dict)]
    return rng.choice(sections)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _value(rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return rng.choice((rng.randrange(-10, 300), rng.uniform(-2, 2), 10.0 ** rng.randrange(-40, 40)))
    return copy.deepcopy(rng.choice(_VALUES))


def _misspell(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name) + 1)
    return rng.choice((name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name.upper(), f"{name} ", name * 9))


def _dump(values: Any) -> str:
    """Write YAML as people's editors do: in blocks, or as one JSON line, which is YAML too."""
    if len(str(values)) % 3 == 0:
        try:
            return json.dumps(values)
        except (TypeError, ValueError):
            pass
    return yaml.dump(values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
