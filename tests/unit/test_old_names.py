"""Documented names of earlier versions still import, as the same modules, and say what they are called now."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import rim_peft.tasks
from rim_peft.old_names import MOVED, MOVED_NAMES, TASKS
from rim_peft.tasks import get_task

API = Path(__file__).parents[2] / "docs" / "api.md"
API_NAMES = runpy.run_path(str(API.with_name("api_names.py")))
NAMES = {
    **MOVED,
    TASKS: "rim_peft.tasks",
    f"{TASKS}.task": "rim_peft.tasks.task",
    f"{TASKS}.potions": "rim_peft.tasks.potions",
}
DOCUMENTED = [
    ("rim_peft.inference.selection", "select_final", "select_by_vote", "select_by_confidence", "select_by_score"),
    ("rim_peft.evaluation.significance", "paired_difference"),
    ("rim_peft.evaluation.faithfulness", "judge_steps"),
    ("rim_peft.evaluation.budget", "budget_curve"),
    ("rim_peft.evaluation.ways", "Way", "by_generate", "by_decoder", "by_thoughts", "count_behind"),
    ("rim_peft.evaluation.representations", "block_components", "training_components"),
    ("rim_peft.data.holdout", "hold_out"),
    ("rim_peft.data.tasks", "get_task", "TASKS", "Task"),
    ("rim_peft.data.tasks.task", "Task", "GeneratedTask"),
    ("rim_peft.data.tasks.gsm8k", "GSM8K", "GSM8KAug"),
    ("rim_peft.data.tasks.columns", "require_text"),
]


@pytest.mark.parametrize("old", sorted(NAMES))
def test_an_old_name_is_the_new_module(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is {NAMES[old]} now"):
        module = import_module(old)
    assert module is import_module(NAMES[old])


@pytest.mark.parametrize("old", sorted(MOVED_NAMES))
def test_an_old_place_of_a_name_has_it(old: str) -> None:
    module, _, name = old.rpartition(".")
    with pytest.warns(FutureWarning, match=rf"{old} is {MOVED_NAMES[old]}\.{name} now"):
        found = getattr(import_module(module), name)
    assert found is getattr(import_module(MOVED_NAMES[old]), name)


@pytest.mark.parametrize(("module", "names"), [(module, names) for module, *names in DOCUMENTED])
def test_documented_names_are_there(module: str, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            assert hasattr(import_module(module), name), name


def test_a_class_exists_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert import_module("rim_peft.data.tasks.potions").Potions is rim_peft.tasks.potions.Potions
        assert type(get_task("rim_peft.data.tasks.gsm8k:GSM8K")) is type(get_task("gsm8k"))


def test_the_warning_points_at_whoever_imports() -> None:
    code = "import rim_peft\nfrom rim_peft.data.tasks import get_task\nfrom rim_peft.data.tasks.task import Task\n"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stderr.count("FutureWarning: rim_peft.data.tasks is rim_peft.tasks now.") == 1


@pytest.mark.parametrize(("heading", "name"), sorted(set(API_NAMES["listed"](API.read_text(encoding="utf-8")))))
def test_the_names_of_the_public_api_are_there(heading: str, name: str) -> None:
    assert any(map(_is_there, API_NAMES["places"](heading, name)))


def _mapped() -> Iterator[str]:
    """Each name with a dot in the tables of docs/paper-map.md that begins with a folder of the package."""
    folders = "|".join(path.name for path in Path(rim_peft.__file__).parent.iterdir() if path.is_dir())
    for line in API.with_name("paper-map.md").read_text(encoding="utf-8").splitlines():
        yield from re.findall(rf"`((?:{folders})\.[A-Za-z_.]+)`", line)


@pytest.mark.parametrize("name", sorted(set(_mapped())))
def test_the_names_of_the_paper_map_are_there(name: str) -> None:
    assert _is_there(f"rim_peft.{name}")


def _is_there(name: str) -> bool:
    found = API_NAMES["find"](name)
    return found is not None and found[0] not in NAMES
