"""The recipe as run."""

from pathlib import Path

from rim_peft.comparison.rows import recipe_hash
from rim_peft.recipe import load_recipe
from rim_peft.recipe.reading import differing_keys, resolve
from rim_peft.recipe.syntax import write_yaml

TEXT = """
output_dir: out
resume: true
model: {config: {model_type: gpt2}}
data: {task: gsm8k}
adapter: {use_rslora: true, num_blocks: 4}
grounding: null
refinement: {learning_rate: 1e-4}
"""


def test_own_options_are_spelled_out_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(TEXT)
    recipe = load_recipe(path)
    resolved = resolve(recipe)
    assert resolved["adapter"] == {
        "num_blocks": 4,
        "block_size": 2,
        "insertion_layer": 0,
        "bidirectional_blocks": False,
        "init_memory": "vocabulary",
        "r": 128,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "use_rslora": True,
    }
    assert resolved["grounding"] is None
    assert resolved["refinement"] == {
        "reset_optimizer": True,
        "dropout": None,
        "loraplus_lr_ratio": None,
        "block_range": None,
        "length_shares": None,
        "length_accuracy": None,
        "layer_shares": None,
        "pack_length": None,
        "max_tokens_per_batch": None,
        "compile_layers": False,
        "learning_rate": 1e-4,
    }
    assert resolved["data"]["max_length"] == 1024
    assert resolved["resume"] is False
    path.write_text(write_yaml(resolved))
    assert resolve(load_recipe(path)) == resolved
    assert differing_keys(resolved, resolve(load_recipe(path))) == []


def test_differences_are_named_by_key() -> None:
    first = {"seed": 0, "output_dir": "a", "data": {"path": "a", "options": {}}, "grounding": None}
    second = {
        "seed": 1,
        "output_dir": "b",
        "data": {"path": "a", "options": {"steps": "x"}},
        "grounding": {"hold": 0.5},
    }
    assert differing_keys(first, second) == [
        "seed",
        "data.options",
        "grounding",
        "data.options.steps",
        "grounding.hold",
    ]


def test_a_run_of_a_version_that_did_not_know_an_option_goes_on() -> None:
    data = {"task": "gsm8k", "max_length": 512}
    first = {"seed": 0, "data": data, "grounding": {"hold": 0.5}}
    for value in (False, True):  # the default, and how special tokens were read before the option was there
        assert differing_keys(first, {**first, "data": {**data, "allow_special_tokens": value}}) == []
    second = {"seed": 0, "data": {**data, "max_rows": 5}, "grounding": {"hold": 0.5, "weight_decay": 0.0}}
    assert differing_keys(first, second) == ["data.max_rows", "grounding.weight_decay"]


def test_a_run_of_a_version_without_variables_of_the_template_can_be_resumed() -> None:
    earlier = {"data": {"path": "a"}}
    assert differing_keys(earlier, {"data": {"path": "a", "chat_template_kwargs": {}}}) == []
    changed = {"data": {"path": "a", "chat_template_kwargs": {"enable_thinking": False}}}
    assert differing_keys(earlier, changed) == ["data.chat_template_kwargs.enable_thinking"]


def test_what_a_run_only_shows_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(TEXT)
    shown, hidden = (load_recipe(path, [f"evaluation.sample_rows={count}"]) for count in (4, 0))
    assert differing_keys(resolve(shown), resolve(hidden)) == []
    assert recipe_hash(shown) == recipe_hash(hidden)  # no comparison is measured again for it
    other = load_recipe(path, ["evaluation.max_new_tokens=5"])
    assert differing_keys(resolve(shown), resolve(other)) == ["evaluation.max_new_tokens"]
    assert recipe_hash(shown) != recipe_hash(other)
