"""What RiM is compared with: the same base, LoRA and rows, trained and answered through the same code."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rim_peft import GroundingConfig, GroundingTrainer, RefinementConfig, RefinementTrainer
from rim_peft.cli.main import main
from rim_peft.data.objective import ReadoutCollator
from rim_peft.data.tokenization import tokenize_separator
from rim_peft.demo import BASE
from rim_peft.evaluation.answers import answer_of
from rim_peft.inference import ThoughtAnswerer
from rim_peft.methods import METHODS, Method
from rim_peft.recipe import Recipe, RecipeError, load_recipe
from rim_peft.run import evaluate, load_run, train
from rim_peft.sequence import BlockTokens
from rim_peft.training import BaselineConfig, BaselineTrainer, CoconutTrainer
from rim_peft.training.baseline import FinalAnswer
from rim_peft.training.curriculum import check_stages
from rim_peft.training.files import write_manifest
from rim_peft.training.metrics import by_block
from rim_peft.training.rim import Refinement
from tests.conftest import EOS_ID, MakeTrainer, build_rim
from tests.integration.test_curriculum import train as train_both
from tests.training import ROWS, assert_equal, batch_of, gradients, train_mode, trained

WAYS: dict[str, tuple[int, bool]] = {"answer": (0, False), "cot": (0, True), "pause": (3, False)}
"""Number of blocks, and whether steps are written."""


def text_of(row: dict[str, Any], *, written: bool, separator: str = "; ") -> str:
    return separator.join([*row["steps"], row["answer"]]) if written else row["answer"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_that_of_separate_sequences(
    architecture: str, way: str, make_trainer: MakeTrainer, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_blocks, written = WAYS[way]
    model = build_rim(architecture, num_blocks=num_blocks)
    trainer = make_trainer(BaselineTrainer, model, written_steps=written, step_separator="; ")
    train_mode(model)
    ours = trainer.compute_loss(trainer.model, batch_of(trainer))
    theirs = torch.zeros(())
    for row in ROWS:
        prompt = tokenizer(f"{row['question']}\n").input_ids
        target = [*tokenizer(text_of(row, written=written)).input_ids, EOS_ID]
        trunk = [*prompt, *model.peft_config["default"].block_tokens.ids(num_blocks)]
        logits = model(input_ids=torch.tensor([[*trunk, *target]])).logits[0, len(trunk) - 1 : -1]
        theirs = theirs - logits.log_softmax(-1)[range(len(target)), target].sum() / len(ROWS)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pack_length", [None, 512])
def test_steps_in_place_are_those_of_separate_sequences(
    pack_length: int | None, make_trainer: MakeTrainer, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_rim(num_blocks=2, block_size=3)
    options = {"steps_in_place": True, "step_weight": 0.5, "pack_length": pack_length}
    trainer = make_trainer(BaselineTrainer, model, **options)
    train_mode(model)
    ours = trainer.compute_loss(trainer.model, batch_of(trainer))
    ours.backward()
    found = gradients(model)
    model.zero_grad()
    theirs, num_cut, num_blocks = torch.zeros(()), 0, set()
    for row in ROWS:
        prompt = tokenizer(f"{row['question']}\n").input_ids
        answer = [*tokenizer(row["answer"]).input_ids, EOS_ID]
        num_blocks.add(most := max(2, len(row["steps"])))
        trunk = [*prompt, *model.peft_config["default"].block_tokens.ids(most)]
        log_probs = model(input_ids=torch.tensor([[*trunk, *answer]])).logits[0].log_softmax(-1)
        theirs = theirs - log_probs[range(len(trunk) - 1, len(trunk) + len(answer) - 1), answer].sum() / len(ROWS)
        for block, step in enumerate(row["steps"]):
            tokens = [*tokenizer(step).input_ids, EOS_ID]
            num_cut += len(tokens) > 3
            first = len(prompt) + block * 5 + 1  # <b>, three memory tokens, </b>
            held = tokens[:3]
            theirs = theirs - 0.5 * log_probs[range(first, first + len(held)), held].sum() / len(ROWS)
    theirs.backward()
    assert num_cut
    assert len(num_blocks) > 1  # a row has a block for each of its steps
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())
    torch.testing.assert_close(found, gradients(model), atol=1e-5, rtol=1e-4)


def test_steps_in_place_need_blocks(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="num_blocks: must be at least 1 with steps_in_place, got 0"):
        make_trainer(BaselineTrainer, build_rim(num_blocks=0), steps_in_place=True)


def test_figures_of_steps_in_place_are_by_block(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(BaselineTrainer, build_rim(num_blocks=4), steps_in_place=True, logging_steps=1)
    assert "5 of 9 steps in the train dataset have more than 2 tokens (EOS included) and are cut there" in caplog.text
    trainer.train()
    blocks = by_block(trainer.state.log_history[0], "token_accuracy")
    longest = max(len(row["steps"]) for row in ROWS)
    assert set(blocks) == {*range(1, longest + 1), 4}


def test_answering_at_once_takes_the_gradients_of_trl(
    make_trainer: MakeTrainer, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """TRL's own trainer on prompt and completion, whose loss is the mean over tokens in place of samples' sums."""
    model = build_rim(num_blocks=0)
    trainer = make_trainer(BaselineTrainer, model)
    num_tokens = sum(len(row["answer_ids"]) for row in trainer.train_dataset)
    (trainer.compute_loss(trainer.model, batch_of(trainer)) * len(ROWS) / num_tokens).backward()
    ours = gradients(model)
    model.zero_grad()
    args = SFTConfig(
        output_dir=str(tmp_path / "theirs"), gradient_checkpointing=False, bf16=False, report_to="none", max_steps=1
    )
    pairs = [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in ROWS]
    plain = SFTTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    rows = plain.data_collator([plain.train_dataset[index] for index in range(len(ROWS))])
    plain.compute_loss(plain.model, rows).backward()
    assert any(gradient.abs().max() > 1e-3 for gradient in ours.values())
    torch.testing.assert_close(ours, gradients(model), atol=1e-5, rtol=1e-4)


def test_memory_rows_are_trained_where_there_are_blocks_alone(make_trainer: MakeTrainer) -> None:
    for num_blocks in (0, 2):
        model = build_rim(num_blocks=num_blocks)
        before = model.base_model.memory.rows("default").detach().clone()
        make_trainer(BaselineTrainer, model, learning_rate=0.1).train()
        has_changed = not torch.equal(before, model.base_model.memory.rows("default"))
        assert has_changed == (num_blocks > 0)
        make_trainer(CoconutTrainer, model)
        assert model.base_model.memory.rows("default").requires_grad  # whatever was trained before


def test_a_separator_must_have_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step_separator: must not be empty"):
        BaselineConfig(output_dir=str(tmp_path), step_separator="")
    with pytest.raises(ValueError, match="steps_in_place: must be False with written_steps"):
        BaselineConfig(output_dir=str(tmp_path), steps_in_place=True, written_steps=True)
    with pytest.raises(ValueError, match="step_weight: must be from 0 to 1000000, got -1"):
        BaselineConfig(output_dir=str(tmp_path), step_weight=-1)
    with pytest.raises(ValueError, match="block_range: must be null"):
        BaselineConfig(output_dir=str(tmp_path), block_range=[1, 2])


# Blocks whose number is drawn.

BLOCKS = BlockTokens(begin=90, memory=91, end=92, block_size=2)


def test_every_batch_draws_its_own_number_of_blocks() -> None:
    objective = Refinement(BLOCKS, num_blocks=5)
    collator = ReadoutCollator(objective, pad_id=0, block_range=(2, 5), seed=1)
    rows = [{"prompt_ids": [1, n], "step_ids": [[2]], "answer_ids": [3, n]} for n in range(60)]
    counts = [collator(rows[n : n + 2])["block_ends"].shape[1] for n in range(59)]
    assert set(counts) == {2, 3, 4, 5}
    assert counts == [collator(rows[n : n + 2])["block_ends"].shape[1] for n in range(59)]
    other = ReadoutCollator(objective, pad_id=0, block_range=(2, 5), seed=2)
    assert counts != [other(rows[n : n + 2])["block_ends"].shape[1] for n in range(59)]
    assert objective.num_tokens(rows[0]) == 2 + 5 * (4 + 2)


def test_a_drawn_number_of_blocks_is_weighed_as_its_own(make_trainer: MakeTrainer) -> None:
    model = build_rim(num_blocks=3)
    trainer = make_trainer(RefinementTrainer, model, block_range=[3, 3])
    batch = batch_of(trainer)
    drawn = trainer.compute_loss(trainer.model, batch)
    fixed = make_trainer(RefinementTrainer, model)
    torch.testing.assert_close(drawn, fixed.compute_loss(fixed.model, batch))
    trainer.train()


def test_a_range_must_hold_the_adapters_own_number(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"block_range: must include the adapter's num_blocks, 4.* got \[1, 3\]"):
        make_trainer(RefinementTrainer, build_rim(num_blocks=4), block_range=[1, 3])


@pytest.mark.parametrize("value", [[0, 2], [3, 2], [1], "1-2", [1.0, 2.0]])
def test_a_range_of_blocks_is_checked(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block_range: must be two integers"):
        RefinementConfig(output_dir=str(tmp_path), block_range=value)


# No reset between the stages.


def _stages(folder: Path, *, reset: bool) -> dict[str, Any]:
    common: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 4,
        "seed": 3,
    }
    return {"refinement": RefinementConfig(output_dir=str(folder / "refinement"), reset_optimizer=reset, **common)}


def _first_moments(folder: Path) -> list[Tensor]:
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return [moment["exp_avg"] for moment in state.values()]


def test_stage_2_can_go_on_with_the_moments_of_stage_1(tmp_path: Path) -> None:
    kept, _ = train_both(tmp_path / "kept", **_stages(tmp_path / "kept", reset=False))
    reset, _ = train_both(tmp_path / "reset", **_stages(tmp_path / "reset", reset=True))
    assert not (tmp_path / "reset" / "grounding" / "optimizer.pt").exists()
    assert len(_first_moments(tmp_path / "kept" / "grounding")) == len(trained(kept))
    state = torch.load(tmp_path / "kept" / "refinement" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert {int(moment["step"]) for moment in state.values()} == {8 + 2}
    differing = [not torch.equal(a, b) for a, b in zip(trained(kept).values(), trained(reset).values(), strict=True)]
    assert any(differing)


def test_a_run_without_reset_resumes_to_the_same_weights(tmp_path: Path) -> None:
    unbroken, _ = train_both(tmp_path / "a", **_stages(tmp_path / "a", reset=False))
    train_both(tmp_path / "b", **_stages(tmp_path / "b", reset=False))
    for name in ("checkpoint-4",):
        for path in (tmp_path / "b" / "refinement" / name).iterdir():
            path.unlink()
        (tmp_path / "b" / "refinement" / name).rmdir()
    (tmp_path / "b" / "refinement" / "final.safetensors").unlink()
    resumed, _ = train_both(tmp_path / "b", resume=True, **_stages(tmp_path / "b", reset=False))
    assert_equal(trained(resumed), trained(unbroken))


# Whole runs.


def write_recipe(folder: Path, base: Path, method: str, **more: Any) -> Path:
    rows = folder / "rows"
    rows.mkdir()
    for split, first in (("train", 0), ("valid", 100), ("test", 200)):
        examples = [
            {"question": f"{n}+1?", "steps": [f"{n}", f"{n}+1={n + 1}"], "answer": f"{n + 1}"}
            for n in range(first, first + 8)
        ]
        (rows / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in examples))
    stage = {"max_steps": 3, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 2}
    recipe = {
        "output_dir": str(folder / "out"),
        "method": method,
        "model": {"name_or_path": str(base)},
        "adapter": {"num_blocks": 2, "r": 4},
        "data": {"task": "gsm8k", "path": str(rows), "validation_rows": 4, "step_separator": "; "},
        "evaluation": {"max_new_tokens": 6},
        **dict.fromkeys(("grounding", "refinement", "baseline", "coconut"), stage),
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.mark.parametrize("method", ["answer", "cot", "pause", "parallel", "coconut"])
def test_a_recipe_trains_answers_and_counts(method: str, base: Path, tmp_path: Path) -> None:
    trained = train(load_recipe(write_recipe(tmp_path, base, method)))
    folder = tmp_path / "out"
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == method
    assert record["training"]["num_samples"] == 12
    assert record["training"]["seconds"] > 0
    assert (folder / ("coconut" if method == "coconut" else "baseline") / "final.safetensors").exists()
    assert not (folder / "grounding").exists()
    loaded = load_run(folder)
    assert loaded.model.peft_config["default"].num_blocks == {"pause": 2, "parallel": 2}.get(method, 0)
    assert (loaded.separator == "; ") == (method == "cot")
    assert isinstance(loaded.answerer(), ThoughtAnswerer) == (method == "coconut")
    assert ("memory blocks" in (folder / "README.md").read_text()) == (method in ("pause", "parallel"))
    first, second = evaluate(trained, split="test"), evaluate(loaded, split="test")
    assert first == second
    assert first["num_rows"] == 8


def test_a_method_of_ones_own_is_one_class(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recipes, trainings, answers, cards and comparisons know methods by what they say of themselves alone."""

    @dataclass(frozen=True)
    class LastStepFirst(FinalAnswer):
        needs_steps = True

        def readouts(self, row: Any, *, num_blocks: int | None = None) -> list[list[int]]:
            return [[*row["step_ids"][-1], *row["answer_ids"]]]

    class LastStepTrainer(BaselineTrainer):
        @classmethod
        def objective_of(cls, args: Any, config: Any, tokenizer: Any = None) -> LastStepFirst:
            return LastStepFirst(replace(config.block_tokens, per_readout=config.num_blocks), 1)

    class LastStep(Method):
        name = "last-step"
        stages = ("baseline",)
        description = "An adapter that says its last step first."

        def trainer(self, stage: str) -> Any:
            return LastStepTrainer

    monkeypatch.setitem(METHODS, "last-step", LastStep())
    path = write_recipe(tmp_path, base, "last-step")
    assert main(["check", str(path)]) == 0
    run = train(load_recipe(path))
    folder = tmp_path / "out"
    assert run.record["method"] == "last-step"
    assert "says its last step first" in (folder / "README.md").read_text()
    assert evaluate(load_run(folder), split="test")["num_rows"] == 8
    assert "last-step" in capsys.readouterr().out + (folder / "recipe.yaml").read_text()


def test_methods_that_are_not_there_are_named(base: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, base, "answer")
    with pytest.raises(RecipeError, match=r"method: must be 'rim', 'answer', .* or 'coconut', got 'cots'"):
        load_recipe(path, ["method=cots"])
    assert {field.name for field in fields(Recipe)} >= {stage for method in METHODS.values() for stage in method.stages}


def test_tokens_and_seconds_are_counted_over_a_resumption(base: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, base, "answer")
    whole = train(load_recipe(path)).recipe
    assert whole is not None
    folder = tmp_path / "out"
    counted = json.loads((folder / "run.json").read_text())["training"]["num_tokens"]
    rows = Dataset.from_json(str(tmp_path / "rows" / "train.jsonl"))
    shortest = min(len(row["question"]) for row in rows)
    assert counted > 12 * shortest
    for name in ("adapter_config.json", "baseline/final.safetensors", "baseline/history.json"):
        (folder / name).unlink()
    for checkpoint in (folder / "baseline").glob("checkpoint-3"):
        (checkpoint / "trainer_state.json").unlink()
    for path_of_state in (folder / "baseline").glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path_of_state.read_text())
        kept = state["stateful_callbacks"]["TrainingClock"]["attributes"]
        logged = max((line.get("train_seconds", 0.0) for line in state["log_history"]), default=0.0)
        assert kept["before"] > logged - 1e-3  # which is rounded to thousandths
        kept["before"] = 1000.0
        path_of_state.write_text(json.dumps(state))
        write_manifest(path_of_state.parent)
    train(load_recipe(path, ["resume=true"]))
    again = json.loads((folder / "run.json").read_text())["training"]
    assert again["num_tokens"] == counted
    assert 1000 <= again["seconds"] < 1100


def test_a_separator_must_survive_the_tokenizer(tmp_path: Path) -> None:
    """The demo's word-level tokenizer writes a semicolon as <unk>, which is not read back."""
    demo = AutoTokenizer.from_pretrained(BASE)
    assert tokenize_separator(demo, ", ") == demo(",").input_ids
    for separator in ("; ", "\n"):
        with pytest.raises(ValueError, match="step_separator: must be a text that the tokenizer can encode"):
            tokenize_separator(demo, separator)


def test_an_answer_follows_the_separator_as_it_was_written() -> None:
    assert answer_of("a, b, (3,4)", ", ") == "(3,4)"
    assert answer_of("1.5+2=3.5. 3.5", ". ") == "3.5"
    assert answer_of("a ,b", ", ") == "b"
    assert answer_of("only", ", ") == "only"
    assert answer_of("1,234", ", ") == "1,234"
    assert answer_of("x\ny", None) == "x\ny"


def test_questions_beyond_a_batch_are_answered(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_recipe(write_recipe(tmp_path, base, "coconut")))
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1?\n2+1?\n3+1?\n"))
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "--batch-size", "1"]) == 0
    assert [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()] == ["1+1?", "2+1?", "3+1?"]
    assert main(["evaluate", str(tmp_path / "out"), "--num-blocks", "3"]) == 1
    assert "must not be given for method 'coconut', which has no blocks" in capsys.readouterr().err


def test_moments_need_a_stage_before_with_the_same_optimiser(tmp_path: Path) -> None:
    stages = _stages(tmp_path, reset=False)
    with pytest.raises(ValueError, match=r"reset_optimizer: .* only one stage has loraplus_lr_ratio"):
        check_stages(
            [
                (GroundingTrainer, GroundingConfig("g", loraplus_lr_ratio=4.0)),
                (RefinementTrainer, RefinementConfig("r", reset_optimizer=False)),
            ]
        )
    with pytest.raises(ValueError, match=r"reset_optimizer: .* after no stage"):
        train_both(tmp_path, **stages, grounding=None)
    stages["refinement"].optim = "adafactor"
    with pytest.raises(ValueError, match="got False with optim adafactor after "):
        train_both(tmp_path, **stages)


def test_recipes_say_what_a_method_cannot_have(base: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, base, "pause")
    with pytest.raises(RecipeError, match=r"num_blocks: must be at least 1 for method 'pause'"):
        load_recipe(path, ["adapter.num_blocks=0"])
    with pytest.raises(RecipeError, match=r"baseline\.written_steps: is set as method"):
        load_recipe(path, ["baseline.written_steps=true"])
    with pytest.raises(RecipeError, match="r: must be at least 1 for method 'cot', which trains only LoRA, got 0"):
        load_recipe(path, ["method=cot", "adapter.r=0"])
    assert load_recipe(path, ["method=coconut", "adapter.insertion_layer=1"]).rim_config().insertion_layer == 0
    with pytest.raises(RecipeError, match="block_range: must stay None for Coconut"):
        load_recipe(path, ["method=coconut", "coconut.block_range=[1, 2]"])
    with pytest.raises(RecipeError, match="method: must be 'rim', 'answer', 'cot', 'pause', 'parallel' or 'coconut'"):
        load_recipe(path, ["method=icot"])
