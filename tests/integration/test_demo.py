"""The demo: the base that comes along can think but not jump, and the whole way from training to the table runs."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_peft.cli.main import main
from rim_peft.demo import BASE, RECIPE, showcase
from rim_peft.demo.base import make_base, measure_accuracy
from rim_peft.demo.pretraining import ANSWER, THINK, Pretraining, build_tokenizer
from rim_peft.demo.task_bases import OntologyBase, PotionsBase
from rim_peft.recipe import load_recipe
from rim_peft.tasks.potions import Potions
from tests.integration.test_curriculum import SignalAtStep

SHORT = [
    "grounding.max_steps=2",
    "refinement.max_steps=2",
    "grounding.per_device_train_batch_size=4",
    "refinement.per_device_train_batch_size=4",
    "data.options.num_rows=16",
    "data.validation_rows=8",
]


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)


def test_the_base_thinks_aloud_but_cannot_answer_longer_questions_at_once(base: tuple[Any, Any]) -> None:
    thinking = measure_accuracy(*base, THINK, options=PotionsBase(), num_rows=100)
    direct = measure_accuracy(*base, ANSWER, options=PotionsBase(), num_rows=100)
    assert all(accuracy >= 0.95 for accuracy in thinking.values()), thinking
    assert direct[1] >= 0.95
    # Chance is 0.2, with a standard error of 0.04 on 100 rows.
    assert all(direct[length] <= 0.4 for length in (2, 3, 4)), direct


def test_the_base_is_what_its_tokenizer_says(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    assert tokenizer.get_vocab() == build_tokenizer(PotionsBase()).get_vocab()
    assert model.config.vocab_size == len(tokenizer)
    assert sum(path.stat().st_size for path in BASE.glob("*.safetensors")) < 4_200_000
    made = json.loads((BASE / "made.json").read_text())
    assert made["command"].startswith("python -m rim_peft.demo.base")


@pytest.mark.slow
def test_the_base_is_made_by_its_command(tmp_path: Path) -> None:
    options = PotionsBase(num_steps=4, plain_steps=1, num_layers=2, batch_size=4)
    for folder in ("a", "b"):
        make_base(options, tmp_path / folder)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("a", "b"))
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter, second.get_parameter(name), atol=0, rtol=0, msg=name)
    assert (tmp_path / "a" / "made.json").exists()


SMALL_BASE = {"num_steps": 5, "plain_steps": 1, "num_layers": 2, "batch_size": 4, "save_steps": 2, "max_length": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        PotionsBase(**SMALL_BASE, num_colours=7, num_names=20, distractors=2),
        OntologyBase(**SMALL_BASE, num_kinds=8, num_statements=12),
    ],
    ids=lambda options: options.task,
)
def test_a_base_that_was_stopped_goes_on_to_the_same_weights(
    options: Pretraining[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(options, tmp_path / "unbroken")
    draw, drawn = Pretraining.draw_sample, []

    def stop(*args: Any, **kwargs: Any) -> tuple[str, str]:
        drawn.append(1)
        if len(drawn) > 4 * 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(Pretraining, "draw_sample", stop)
    with pytest.raises(KeyboardInterrupt):
        make_base(options, tmp_path / "stopped")
    monkeypatch.setattr(Pretraining, "draw_sample", draw)
    with pytest.raises(SystemExit, match="holds a training with other options"):
        make_base(replace(options, seed=1), tmp_path / "stopped")
    make_base(options, tmp_path / "stopped")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("unbroken", "stopped"))
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter, second.get_parameter(name), atol=0, rtol=0, msg=name)
    assert not list((tmp_path / "stopped").glob("training*"))
    with pytest.raises(SystemExit, match=r"holds a finished base \(made\.json\)"):
        make_base(replace(options, seed=1), tmp_path / "stopped")
    made = json.loads((tmp_path / "stopped" / "made.json").read_text())
    assert (made["options"]["max_length"], list(made["validation"]["direct"])) == (3, ["1", "2", "3"])


def test_from_training_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "demo")
    assert main(["demo", "--output-dir", output, "--num-rows", "4", *SHORT]) == 0
    table = capsys.readouterr().out
    for row in (
        "base, answering at once",
        "base, writing its steps out",
        "answer-only LoRA",
        "RiM, after the last block",
    ):
        assert re.search(rf"^{row}.*?( +\d\.\d\d ± \d\.\d\d){{4}}$", table, re.MULTILINE), table
    assert re.search(r"^  block 4( +\d\.\d\d){4}$", table, re.MULTILINE)
    assert "true colours on the way" in table
    # A second call shows the adapter again, without training; the figures are the same.
    assert main(["demo", "--output-dir", output, "--num-rows", "4", "--json", *SHORT]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert set(judged["rim"]) == {"1", "2", "3", "4"}
    assert len(judged["rim_by_block"]) == 4
    shown = re.search(r"^RiM, after the last block +(\d\.\d\d)", table, re.MULTILINE)
    assert shown is not None
    assert f"{judged['rim']['1']['accuracy']:.2f}" == shown[1]
    # With other values it does not pass off the old adapter as theirs.
    assert main(["demo", "--output-dir", output, "--seed", "7", *SHORT]) == 1
    assert "holds a finished run with other values of seed" in capsys.readouterr().err


def test_the_last_block_is_the_answer_of_generate(tmp_path: Path) -> None:
    run = showcase.train_demo(tmp_path / "demo", seed=0, overrides=SHORT, command=[])
    examples = showcase.draw_examples(4)
    assert len(examples) == 16
    judged = showcase.judge(run, num_rows=4)
    right = 0
    for example in examples:
        inputs = run.tokenizer(f"{example.question} {ANSWER}", return_tensors="pt")
        output = run.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        text = run.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += Potions().is_correct(text, example.answer)
    assert sum(score["num_correct"] for score in judged["rim"].values()) == right


def test_the_baseline_trains_on_as_many_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--baseline", "--output-dir", str(tmp_path), "--num-rows", "4", *SHORT]) == 0
    accuracy = json.loads(capsys.readouterr().out)
    assert {score["num_rows"] for score in accuracy.values()} == {4}


@pytest.mark.parametrize("given", ["--baseline", "grounding.max_steps=2"])
def test_the_pretrained_base_is_not_trained(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--base", "smollm2", given]) == 1
    assert f"base: must be tiny to train anything, got smollm2 and {given}" in capsys.readouterr().err


def test_stored_figures_name_their_command() -> None:
    stored = showcase.stored_figures()
    assert stored["answer_only"]["command"].startswith("rim-peft demo --baseline")
    assert set(stored["answer_only"]["accuracy"]) == {"1", "2", "3", "4"}


def test_questions_of_the_test_split_were_never_trained_on() -> None:
    options = load_recipe(RECIPE, []).task()
    trained = {row["question"] for row in options.rows("train")}
    assert not trained & {example.question for example in showcase.draw_examples(100)}


def test_a_damaged_output_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(BASE, folder)
    assert main(["demo", "--output-dir", str(folder), "--num-rows", "4", *SHORT]) == 1
    assert "output_dir: must be new or empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_demo_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SignalAtStep(monkeypatch, "refinement", 1, signal.SIGTERM)
    command = ["demo", "--output-dir", str(tmp_path / "demo"), "--num-rows", "4", *SHORT]
    assert main(command) == 128 + signal.SIGTERM
    assert "rerun the command to resume" in capsys.readouterr().err
    assert main(command) == 0
    assert "RiM, after the last block" in capsys.readouterr().out


@pytest.mark.slow
def test_the_baseline_does_not_stand_in_the_demos_way(tmp_path: Path) -> None:
    output = str(tmp_path / "demo")
    assert main(["demo", "--baseline", "--output-dir", output, "--num-rows", "4", *SHORT]) == 0
    assert main(["demo", "--output-dir", output, "--num-rows", "4", *SHORT]) == 0
