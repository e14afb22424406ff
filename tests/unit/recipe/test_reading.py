"""Recipes: from YAML to checked dataclasses, and everything that is wrong with one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rim_peft.demo import RECIPE as DEMO
from rim_peft.recipe import Recipe, RecipeError, load_recipe
from rim_peft.recipe import problems as recipe_problems
from rim_peft.recipe.checks import all_keys
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import read_yaml, write_yaml
from rim_peft.tasks import get_task

# Those in compare/ and accelerate/ are no recipes of a run.
RECIPES = [DEMO, *sorted((Path(__file__).parents[3] / "recipes").glob("[!ac]*/*.yaml"))]
SMALL = """
output_dir: out
model: {name_or_path: some/base}
data: {task: gsm8k}
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_recipe(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return write_recipe


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the file's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def with_values(**sections: Any) -> str:
    return write_yaml({**read_yaml(SMALL), **sections})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_of_the_repository_is_good(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.method != "rim":
        assert [trainer.__name__ for trainer, _ in recipe.stage_trainers()] == ["BaselineTrainer"]
        return
    stages = ["GroundingTrainer", "RefinementTrainer"]
    # LogiQA has no steps, so stage 1 has nothing to train on.
    assert [trainer.__name__ for trainer, _ in recipe.stage_trainers()] == stages[recipe.data.task == "logiqa" :]
    # As many as the longest chain has steps, where that is known.
    usual = {"potions": [4], "ontology": [4], "gsm-symbolic": [4], "handfuls": [5], "rows": [3]}.get(recipe.data.task)
    longest = 8 if usual is None else max(recipe.data.options.get("lengths", usual))
    assert recipe.rim_config().num_blocks == longest
    text = path.read_text(encoding="utf-8")
    for heading in ("# Purpose: ", "# Command: rim-peft train ", "# Hardware: ", "# Expected: "):
        assert heading in text.partition("output_dir:")[0]
    assert path.relative_to(Path(__file__).parents[3]).as_posix() in text


def test_there_are_recipes() -> None:
    assert [f"{path.parent.name}/{path.name}" for path in RECIPES] == [
        "demo/recipe.yaml",
        "errands/smollm2.yaml",
        "gsm-symbolic/smollm2.yaml",
        "gsm8k/gemma-3-1b-qlora.yaml",
        "gsm8k/gpt2-lora.yaml",
        "gsm8k/gpt2.yaml",
        "gsm8k/llama-3.2-1b-official-qlora.yaml",
        "gsm8k/llama-3.2-1b-qlora.yaml",
        "gsm8k/llama-3.2-1b.yaml",
        "gsm8k/llama-3.2-3b-qlora.yaml",
        "gsm8k/qwen3-0.6b-qlora.yaml",
        "gsm8k/qwen3-1.7b-qlora.yaml",
        "gsm8k/tiny.yaml",
        "handfuls/smollm2.yaml",
        "logiqa/qwen3-1.7b-qlora.yaml",
        "math/qwen3-1.7b-qlora.yaml",
        "potions/demo-nf4.yaml",
        "potions/large.yaml",
        "potions/long.yaml",
        "potions/smollm2-answer.yaml",
        "potions/smollm2-cot.yaml",
        "potions/smollm2.yaml",
        "prosqa/generated.yaml",
        "prosqa/tiny.yaml",
        "strategyqa/llama-3.2-3b-qlora.yaml",
    ]


def test_what_is_not_given_has_its_default(write: Write) -> None:
    recipe = load_recipe(write(SMALL))
    assert recipe.seed == 0
    assert recipe.data.validation_split == "validation"
    (_, grounding), (_, refinement) = recipe.stage_trainers()
    assert grounding is not None
    assert refinement is not None
    assert grounding.output_dir == str(Path("out/grounding"))
    assert grounding.schedule == "relative"
    assert refinement.max_length == 1024
    assert recipe.task().name == "gsm8k"


def test_shared_options_reach_the_stages(write: Write) -> None:
    text = with_values(seed=7, data={"task": "prosqa", "step_template": "<{step}>", "max_length": None})
    (_, config), _ = load_recipe(write(text), ["data.on_bad_rows=drop"]).stage_trainers()
    assert config is not None
    assert (config.seed, config.step_template, config.max_length, config.on_bad_rows) == (7, "<{step}>", None, "drop")


def test_overrides_win_and_null_removes(write: Write) -> None:
    text = with_values(grounding={"learning_rate": 1.0, "max_steps": 3}, refinement={"max_steps": 2})
    overrides = ["grounding.learning_rate=1e-4", "grounding.max_steps=null", "refinement=null", "data.max_length=null"]
    recipe = load_recipe(write(text), [*overrides, "adapter.r=8"])
    assert recipe.grounding == {"learning_rate": 1e-4}
    assert recipe.refinement is None
    assert recipe.stages == ["grounding"]
    assert recipe.data.max_length is None
    assert recipe.adapter == {"r": 8}


def test_an_override_of_the_base_displaces_the_files_other_way(write: Write) -> None:
    path = write(with_values(model={"config": {"model_type": "gpt2"}}))
    assert load_recipe(path, ["model.name_or_path=gpt2"]).model.config is None
    assert problems(path, "model.name_or_path=gpt2", "model.config={model_type: llama}") == [
        "command line: model.name_or_path: either this or config must be given, got both."
    ]


def test_all_problems_come_at_once(write: Write) -> None:
    text = """
sed: 1
model: {config: {model_type: llama, hiden_size: 3}, dtype: fp8}
adapter: {r: -1, num_blcks: 2, revision: main, num_blocks: true, lora_dropout: 2}
data: {task: gsm8k, prompt_template: x, answer_template: "{a}", options: {steps: foo, stepz: 1}, max_length: 0}
grounding: {learning_rate: "1e-4", schedule: foo, hold: 2, seed: 3, lr_scheduler_type: foo, eval_strategy: no}
refinement: {num_blcks: 2, packing: true, fp16: 3}
"""
    found = problems(write(text), "grounding.lerning_rate=3", "data.max_lengths=4", "seed")
    expected = [
        "command line: seed: must read key=value",
        "sed: unknown key, did you mean seed?",
        "output_dir: must be given",
        "model.config.hiden_size: unknown key, did you mean hidden_size?",
        "model.dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got 'fp8'.",
        "adapter.num_blcks: unknown key, did you mean num_blocks?",
        "adapter.num_blocks: must be an integer, got True.",
        "adapter.r: must be an integer of at least 0, got -1.",
        "adapter.lora_dropout: must be a number in [0, 1), got 2.0.",
        "adapter.revision: is set as model.revision.",
        "data.prompt_template: must hold {question} once",
        "data.answer_template: must hold {answer} once",
        "data.options.stepz: unknown key, did you mean steps?",
        "data.options.steps: must be 'equations' or 'sentences', got 'foo'.",
        "data.max_length: must be at least 1, got 0.",
        "command line: data.max_lengths: unknown key, did you mean max_length?",
        "grounding.learning_rate: must be a number, got '1e-4'.",
        "grounding.schedule: must be one of relative, linear, uniform, got 'foo'.",
        "grounding.hold: must be a number in [0, 1), got 2.0.",
        "grounding.seed: is set as seed.",
        "grounding.lr_scheduler_type: foo is not a valid SchedulerType",
        "command line: grounding.lerning_rate: unknown key, did you mean learning_rate?",
        "refinement.num_blcks: unknown key, did you mean adapter.num_blocks?",
        "refinement.packing: must stay False, got True",
        "refinement.fp16: must be true or false, got 3.",
    ]
    for line in expected:
        assert any(line in got for got in found), line
    assert len(found) == len(expected)


def test_lines_name_file_and_key(write: Write) -> None:
    path = write(with_values(adapter={"num_blcks": 2}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: adapter.num_blcks: unknown key, did you mean num_blocks?"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"model": {}}, "model.name_or_path: either this or config must be given, got neither."),
        ({"model": None}, "model.name_or_path: either this or config must be given, got neither."),
        ({"model": {"config": {"hidden_size": 8}}}, "model.config: must hold model_type, such as 'llama'"),
        ({"model": {"config": {"model_type": "lama"}}}, "model.config.model_type: Unrecognized model identifier: lama"),
        ({"model": "gpt2"}, "model: must be a section with keys, got 'gpt2'."),
        ({"data": {}}, "data.task: must be given."),
        ({"data": {"task": "gsm9k"}}, "data.task: no task 'gsm9k', did you mean 'gsm8k'?"),
        (
            {"data": {"task": "gsm8k", "train_split": "validation"}},
            "data.validation_split: must differ from train_split",
        ),
        ({"data": {"task": "gsm8k", "validation_rows": -1}}, "data.validation_rows: must be at least 0, got -1."),
        ({"evaluation": {"batch_size": 0}}, "evaluation.batch_size: must be at least 1, got 0."),
        ({"grounding": None, "refinement": None}, "refinement: must not be null if grounding is null too."),
        ({"grounding": 3}, "grounding: must be a mapping or null, got 3."),
        ({"resume": 1}, "resume: must be true or false, got 1."),
        ({"adapter": {"peft_type": "LORA"}}, "adapter.peft_type: is set by the adapter itself, remove it."),
        ({"grounding": {"max_length": 3}}, "grounding.max_length: is set as data.max_length."),
        ({"refinement": {"output_dir": "x"}}, "refinement.output_dir: is set as output_dir."),
        (
            {"refinement": {"load_best_model_at_end": True}},
            "refinement.load_best_model_at_end: --load_best_model_at_end",
        ),
    ],
)
def test_single_problems(write: Write, sections: dict[str, Any], line: str) -> None:
    (found,) = problems(write(with_values(**sections)))
    assert found.startswith(line)


def test_a_path_without_a_task_means_rows(write: Write) -> None:
    options = {"columns": {"question": "ask"}, "split_steps": "lines"}
    text = with_values(data={"path": "rows.csv", "options": options})
    recipe = load_recipe(write(text), ["data.options.columns.answer=say"])
    assert recipe.data.task == "rows"
    assert resolve(recipe)["data"]["options"] == {**options, "columns": {"question": "ask", "answer": "say"}}
    assert recipe.task() == get_task("rows", **recipe.data.options)
    bad = {"columns": {"ask": "question"}, "split_steps": 3, "split_stepz": "lines"}
    assert problems(write(with_values(data={"path": "rows.csv", "options": bad}))) == [
        "data.options.split_stepz: unknown key, did you mean split_steps?",
        "data.options.split_steps: must be a text or null, got 3, put it in quotes.",
        "data.options.columns: must have keys among question, steps, answer, got 'ask'.",
    ]


def test_a_stream_needs_steps_and_a_validation_split(write: Write) -> None:
    data = {"task": "gsm8k", "streaming": True, "validation_split": None}
    assert problems(write(with_values(data=data, refinement={"max_steps": 5}))) == [
        "grounding.max_steps: must be given with data.streaming, since a stream has no length.",
        "data.validation_split: must be given with streaming, since rows of a stream cannot be held out, got null. "
        "Name a split, or set validation_rows=0.",
    ]


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_a_recipe_is_a_mapping(write: Write, text: str) -> None:
    assert problems(write(text)) == ["must hold keys with values, such as 'output_dir: outputs/run'."]


def test_an_override_cannot_go_into_a_value(write: Write) -> None:
    assert problems(write(SMALL), "output_dir.more=1") == [
        "command line: output_dir.more: output_dir is a value, not a section."
    ]


def test_repeated_keys_name_the_file(write: Write) -> None:
    assert problems(write(f"{SMALL}output_dir: b\n")) == ["line 5: output_dir: is given twice, keep one."]


def test_hardware_is_not_the_recipes_matter(write: Write) -> None:
    recipe = load_recipe(write(with_values(grounding={"bf16": True, "tf32": True})))
    assert recipe.grounding == {"bf16": True, "tf32": True}


def test_without_checks_other_packages_options_pass(write: Write) -> None:
    path = write(with_values(grounding={"option_of_another_release": 1}))
    recipe = load_recipe(path, check=False)
    assert isinstance(recipe, Recipe)
    assert recipe.grounding == {"option_of_another_release": 1}


def test_a_configuration_is_new_each_time(write: Write) -> None:
    recipe = load_recipe(write(SMALL))
    assert recipe.rim_config() is not recipe.rim_config()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": -1}, "seed: must be from 0 to 4294967295, got -1."),
        ({"seed": 10**30}, "seed: must be finite and of at most 64 bits, got 1000"),
        ({"adapter": {"num_blocks": 10**9}}, "adapter.num_blocks: must be from 0 to 4096, got 1000000000."),
        ({"adapter": {"r": 10**9}}, "adapter.r: must be from 0 to 65536, got 1000000000."),
        ({"adapter": {"rank_pattern": {"q_proj": -1}}}, "adapter.rank_pattern: must give each name an integer from 1"),
        ({"adapter": {"lora_dropout": 7}}, "adapter.lora_dropout: must be a number in [0, 1), got 7.0."),
        ({"grounding": {"learning_rate": math.inf}}, "grounding.learning_rate: must be finite and of at most 64 bits"),
        ({"grounding": {"learning_rate": 10**400}}, "grounding.learning_rate: must be finite and of at most 64 bits"),
        ({"grounding": {"learning_rate": 1e30}}, "grounding.learning_rate: must be from 0 to 10, got 1e+30."),
        ({"grounding": {"learning_rate": -1e-4}}, "grounding.learning_rate: must be from 0 to 10, got -0.0001."),
        ({"grounding": {"weight_decay": math.nan}}, "grounding.weight_decay: must be finite and of at most 64 bits"),
        ({"grounding": {"adam_beta2": 1}}, "grounding.adam_beta2: must be at least 0 and below 1, got 1.0."),
        ({"grounding": {"per_device_train_batch_size": 0}}, "grounding.per_device_train_batch_size: must be from 1 to"),
        ({"grounding": {"gradient_accumulation_steps": 0}}, "grounding.gradient_accumulation_steps: must be from 1 to"),
        ({"grounding": {"num_train_epochs": 0}}, "grounding.num_train_epochs: must be above 0 and at most 1000000"),
        ({"grounding": {"block_range": [1, 10**9]}}, "grounding.block_range: must be two integers from 1 to"),
        ({"grounding": {"dataloader_num_workers": -1}}, "grounding.dataloader_num_workers: must be from 0 to 1024"),
        ({"grounding": {"optim": "adamm"}}, "grounding.optim: adamm is not a valid OptimizerNames"),
        ({"coconut": {"num_stages": 10**9}}, "coconut.num_stages: must be from 1 to 1000, got 1000000000."),
        ({"evaluation": {"max_new_tokens": 10**9}}, "evaluation.max_new_tokens: must be from 1 to 16777216"),
        ({"data": {"task": "gsm8k", "max_length": 10**12}}, "data.max_length: must be from 1 to 16777216"),
        ({"data": {"task": "potions", "options": {"num_rows": 10**15}}}, "data.options.num_rows: must be from 1 to"),
        ({"data": {"task": "multiplication", "options": {"num_digits": 10**9}}}, "data.options.num_digits: must be"),
        ({"output_dir": "a\tb"}, "output_dir: must not hold control characters, got 'a\\tb'."),
        ({"output_dir": "~nobody-here/x"}, "output_dir: must be in an existing home folder"),
    ],
)
def test_values_that_cannot_work_are_refused(write: Write, changes: dict[str, Any], line: str) -> None:
    assert [found for found in problems(write(with_values(**changes))) if found.startswith(line)]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"hidden_size": 30},
            "model.config.hidden_size: .* hidden size \\(30\\) is not a multiple",
        ),
        ({"vocab_size": 10**9}, "model.config.vocab_size: must be from 1 to 2097152, got 1000000000."),
        ({"num_hidden_layers": 0}, "model.config.num_hidden_layers: must be from 1 to 4096, got 0."),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads: must be a multiple of"),
        ({"attention_dropout": 7}, "model.config.attention_dropout: must be at least 0 and below 1, got 7"),
        ({"hidden_act": "foo"}, "model.config.hidden_act: must be one of .*, got 'foo'."),
        ({"rms_norm_eps": "x"}, "model.config.rms_norm_eps: must be of type float, got 'x'."),
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, "model.config.n_embd: must be a multiple of .*n_head, 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(write: Write, config: dict[str, Any], line: str) -> None:
    small = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, **config}
    if config.get("model_type") == "gpt2":
        small = config
    assert re.search(line, "\n".join(problems(write(with_values(model={"config": small})))))


@pytest.mark.parametrize(
    ("changes", "meant"),
    [
        ({"max_seq_length": 512}, "max_seq_length: unknown key, did you mean data.max_length?"),
        ({"coconut": {"max_seq_length": 512}}, "coconut.max_seq_length: unknown key, did you mean data.max_length?"),
        ({"data": {"task": "gsm8k", "cutoff_len": 5}}, "data.cutoff_len: unknown key, did you mean max_length?"),
        ({"adapter": {"lora_rank": 8}}, "adapter.lora_rank: unknown key, did you mean r?"),
        ({"lora_target_modules": "x"}, "lora_target_modules: unknown key, did you mean adapter.target_modules?"),
        ({"refinement": {"lr": 1}}, "refinement.lr: unknown key, did you mean learning_rate?"),
        ({"micro_batch_size": 2}, "micro_batch_size: unknown key, did you mean grounding.per_device_train_batch_size?"),
        ({"load_in_4bit": True}, "load_in_4bit: unknown key, did you mean model.quantization: nf4?"),
        ({"base_model": "x"}, "base_model: unknown key, did you mean model.name_or_path?"),
        ({"model": {"name_or_path": "x", "torch_dtype": "x"}}, "model.torch_dtype: unknown key, did you mean dtype?"),
    ],
)
def test_other_tools_names_lead_to_ours(write: Write, changes: dict[str, Any], meant: str) -> None:
    assert problems(write(with_values(**changes))) == [meant]


def test_every_other_name_leads_to_a_key_of_ours() -> None:
    known = {*all_keys(), *(field.name for field in fields(Recipe))}
    for name in recipe_problems._KEYS:
        meant = str(recipe_problems.foreign_key("", name)).partition(":")[0]
        assert meant in known, name


def test_home_folders_are_written_out(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/ann")
    path = write(with_values(output_dir="~/runs/x", model={"name_or_path": "~/base", "tokenizer": "~/tokens"}))
    recipe = load_recipe(path)
    assert (recipe.output_dir, recipe.model.name_or_path) == ("/users/ann/runs/x", "/users/ann/base")
    assert recipe.model.tokenizer == "/users/ann/tokens"
    assert load_recipe(path, ["output_dir=~/y"]).output_dir == "/users/ann/y"


def test_variables_of_the_chat_template(write: Write) -> None:
    path = write(SMALL)
    recipe = load_recipe(path, ["data.chat_template_kwargs.enable_thinking=false"])
    assert recipe.data.chat_template_kwargs == {"enable_thinking": False}
    assert recipe.data.templates.chat_template_kwargs == {"enable_thinking": False}
    assert all(args.templates.chat_template_kwargs == {"enable_thinking": False} for _, args in recipe.stage_trainers())
    again = write(write_yaml(resolve(recipe)))
    assert resolve(load_recipe(again)) == resolve(recipe)
    path = write(SMALL)
    for value, rule in (
        ("[1]", "must be a mapping"),
        ("{tokenize: true}", "must be a variable of the chat template, but is an argument that this package sets"),
        ("{1: 2}", "must be a mapping of the chat template's variables"),
    ):
        (line,) = problems(path, f"data.chat_template_kwargs={value}")
        assert "data.chat_template_kwargs" in line
        assert rule in line
    (line,) = problems(path, "refinement.chat_template_kwargs={a: 1}")
    assert "data.chat_template_kwargs" in line
