"""The adapter that ships: whole, as good as its card says, and shown by the demo without training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rim_peft.cli.main import main
from rim_peft.demo import SHIPPED
from rim_peft.demo.shipped import judge, load_shipped, stored_results
from rim_peft.demo.showcase import LENGTHS, draw_examples
from rim_peft.inspection import Options, inspect_questions
from rim_peft.recipe import load_recipe
from rim_peft.tasks.potions import Potions
from tests.real.conftest import RECIPE

PICTURE = Path(__file__).parents[2] / "docs" / "mind.svg"


@pytest.fixture(scope="module")
def run() -> Any:
    return load_shipped()


def test_it_is_small_and_names_no_folder_of_a_machine() -> None:
    files = sorted(path.name for path in SHIPPED.iterdir())
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.yaml",
        "results.json",
        "run.json",
    ]
    assert (SHIPPED / "adapter_model.safetensors").stat().st_size <= 10_000_000
    for name in ("README.md", "adapter_config.json", "recipe.yaml", "run.json"):
        assert not re.search(r"(?<![\w.<])/(?!div)\w+/\w", (SHIPPED / name).read_text(encoding="utf-8")), name


def test_it_is_as_good_as_its_stored_figures_say(run: Any) -> None:
    stored = stored_results()
    found = judge(run, draw_examples(12, seed=5))
    for length in map(str, LENGTHS):
        expected, got = stored["rim"][length]["accuracy"], found["rim"][length]["accuracy"]
        assert got >= expected - 0.25, (length, expected, got)  # three standard errors of 12 rows at 0.9
    # A chain needs as many blocks as it has steps: before, the answer is not there yet.
    assert found["rim_by_block"][0]["4"]["accuracy"] <= 0.6


def test_it_was_never_trained_on_what_it_is_judged_on(run: Any) -> None:
    trained = {row["question"] for row in load_recipe(RECIPE, []).task().rows("train")}
    assert not trained & {example.question for example in draw_examples(250)}
    assert run.recipe.data.options == load_recipe(RECIPE, []).data.options


def test_the_picture_in_the_readme_is_what_it_holds(run: Any) -> None:
    picture = ElementTree.parse(PICTURE).getroot()  # noqa: S314
    asked = picture.findtext("{http://www.w3.org/2000/svg}title")
    assert asked in {row["question"] for row in Potions(lengths=(4,), num_held_out=60).rows("test")}
    assert asked not in {row["question"] for row in load_recipe(RECIPE, []).task().rows("train")}
    told = picture.findtext("{http://www.w3.org/2000/svg}desc")
    held = inspect_questions(run, [asked], options=Options(chain_tokens=0)).questions[0].readouts
    assert told == "; ".join(f"after block {readout.block}: “{readout.text}”" for readout in held)


def test_the_demo_shows_it_without_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--base", "smollm2", "--num-rows", "2", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    for label in stored_results()["others"]:
        assert f"{label} *" in shown
    assert re.search(r"^RiM, after the last block +\d\.\d\d ±", shown, re.MULTILINE)
    assert len(re.findall(r"^  read out after each block: \w+ \| \w+ \| \w+ \| \w+$", shown, re.MULTILINE)) == 3


def test_the_demo_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--base", "smollm2", "--num-rows", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["latency"]) == {"direct", "rim", "written"}
    assert figures["latency"]["written"]["num_tokens"] > 3 * figures["latency"]["rim"]["num_tokens"]
    assert set(figures["rim"]) == {str(length) for length in LENGTHS}
