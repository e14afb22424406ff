"""Trainings that go wrong or are stopped: the former end with an error and nothing saved, the latter lose no figure."""

from __future__ import annotations

import math
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerCallback

from rim_peft import GroundingConfig, GroundingTrainer, RefinementConfig, RiMConfig
from rim_peft.training.baseline import BaselineConfig, BaselineTrainer
from rim_peft.training.checkpoints import BestWeights, last_checkpoint, save_weights
from rim_peft.training.coconut import CoconutConfig, CoconutTrainer
from rim_peft.training.curriculum import CurriculumResult, Interrupted, run_stages
from rim_peft.training.files import MANIFEST
from rim_peft.training.finite import DivergedError
from rim_peft.training.metrics import by_block
from rim_peft.training.samples import Sample
from tests.conftest import build_base, build_rim, build_tokenizer
from tests.integration.test_curriculum import ROWS, SignalAtStep, train
from tests.training import trained

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "save_steps": 3,
    "logging_steps": 10,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def _trainer(folder: Path, model: Any, **options: Any) -> GroundingTrainer:
    rates = {name: options.pop(name) for name in ("learning_rate", "weight_decay") if name in options}
    args = GroundingConfig(**{"output_dir": str(folder), **OPTIONS, **options})
    for name, rate in rates.items():
        setattr(args, name, rate)  # beyond what a configuration takes
    rows = Dataset.from_list(ROWS)
    return GroundingTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=build_tokenizer())


class RuinAfter(TrainerCallback):
    """Makes one weight of the adapter infinite after a step, as a gradient that is not finite would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            parameter = next(p for p in kwargs["model"].parameters() if p.requires_grad)
            parameter.data.view(-1)[0] = math.inf


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"learning_rate": 1e30}, "the loss of step 2 is nan"),
        ({"weight_decay": math.nan, "logging_nan_inf_filter": True}, "the loss of step 2 is nan"),
        ({"learning_rate": math.inf, "max_steps": 1}, r"of the weights after step 1 \S+ holds -?(inf|nan)"),
    ],
)
def test_a_diverged_training_stops_and_saves_nothing(options: dict[str, Any], found: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, build_rim(num_blocks=3, fresh=True), **options)
    with pytest.raises(DivergedError, match=rf"^grounding: .* must stay finite, {found}.*Lower learning_rate"):
        trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(DivergedError):
        trainer.save_model()


@pytest.mark.parametrize("kind", ["answer", "written steps", "coconut"])
def test_every_method_stops(kind: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "output_dir": str(tmp_path / "stage")}
    stage: Any = (BaselineTrainer, BaselineConfig(written_steps=kind == "written steps", **options))
    if kind == "coconut":
        stage = (CoconutTrainer, CoconutConfig(**options))
    stage[1].learning_rate = 1e30  # beyond what a configuration takes
    model = build_rim(num_blocks=0, fresh=True)
    with pytest.raises(DivergedError, match="must stay finite"):
        run_stages(model, build_tokenizer(), [stage], train_dataset=Dataset.from_list(ROWS), output_dir=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_ruined_run_keeps_its_last_good_checkpoint_and_goes_on_from_no_other(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, build_rim(num_blocks=3, fresh=True))
    trainer.add_callback(RuinAfter(4))
    with pytest.raises(DivergedError, match=r"the loss of step 5 is (nan|inf)"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    # As an earlier version would have written it:
    ruined = tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-3").rename(ruined)
    weights = ruined / "adapter_model.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(weights).items()}, weights)
    (ruined / MANIFEST).unlink()
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"must be intact, got .*checkpoint-6, where .* holds nan"):
        _trainer(tmp_path, build_rim(num_blocks=3, fresh=True)).train(resume_from_checkpoint=str(ruined))


def test_a_gradient_that_is_not_finite_stops_the_training_unless_loss_scaling_skips_the_step(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, build_rim(num_blocks=3, fresh=True))
    with pytest.raises(DivergedError, match="grad_norm at step 0 is inf"):
        trainer.log({"loss": 1.0, "grad_norm": math.inf})
    trainer.accelerator.scaler = SimpleNamespace()
    trainer.log({"loss": 1.0, "grad_norm": math.inf})
    with pytest.raises(DivergedError, match="eval_loss at step 0 is nan"):
        trainer.log({"eval_loss": math.nan})


@pytest.mark.parametrize("score", [math.nan, math.inf, "0.5", True])
def test_a_score_that_nothing_is_better_than_is_refused(score: Any, tmp_path: Path) -> None:
    best = BestWeights(tmp_path / "best.safetensors", ["grounding"])
    with pytest.raises(ValueError, match=f"validate: accuracy must be a finite number.*got {score!r} at step 2"):
        best.offer(build_rim(), score, stage="grounding", step=2)
    assert not best.path.exists()


@pytest.mark.parametrize(
    ("stage", "step", "score", "is_fine"),
    [
        ("grounding", 4, 0.5, True),  # the best of the log
        ("grounding", 2, 0.5, False),
        ("grounding", 4, 0.75, False),  # better than anything that this run has seen
        ("other", 4, 0.5, False),
        ("grounding", 6, 0.5, True),  # offered where the run goes on, before it was killed
        ("refinement", 2, 0.75, True),
        ("refinement", 2, 0.25, False),  # worse than the log's, so never kept
    ],
)
def test_the_best_weights_of_another_run_are_noticed(
    tmp_path: Path, stage: str, step: int, score: float, is_fine: bool
) -> None:
    best = BestWeights(tmp_path / "best.safetensors", ["grounding", "refinement"])
    save_weights(build_rim(), best.path, best={"stage": stage, "step": step, "accuracy": score})
    offered = [{"stage": "grounding", "step": at, "accuracy": scored} for at, scored in ((2, 0.5), (4, 0.5), (6, 0.0))]
    with (
        nullcontext()
        if is_fine
        else pytest.raises(
            ValueError, match=f"accuracy 0.5 at step 4 of grounding, got accuracy {score} at step {step} of {stage}"
        )
    ):
        best.check(offered, at=("grounding", 6))


def test_the_metric_that_chooses_a_checkpoint_must_be_finite(tmp_path: Path) -> None:
    args = GroundingConfig(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=3, metric_for_best_model="accuracy", **OPTIONS
    )
    rows = Dataset.from_list(ROWS[:4])
    trainer = GroundingTrainer(
        build_rim(num_blocks=3, fresh=True),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=build_tokenizer(),
        validate=lambda model: {"accuracy": math.nan, "other": math.nan},
    )
    with pytest.raises(ValueError, match=r"metric_for_best_model: eval_accuracy must be finite.*got nan at step 3"):
        trainer.train()


def test_weights_that_are_not_finite_are_saved_nowhere(tmp_path: Path) -> None:
    model = build_rim()
    model.base_model.memory.rows("default").data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"w\.safetensors: not written.*lora_rim_memory\S* holds nan"):
        save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"adapter 'default': its weights must be finite to be saved.*holds nan"):
        model.save_pretrained(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_weights_come_back_under_any_adapter_name(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model: Any = get_peft_model(build_base(), RiMConfig(num_blocks=3, r=4), adapter_name=name)
    seen: list[dict[str, torch.Tensor]] = []

    def validate(model: PeftModel) -> dict[str, float]:
        seen.append(trained(model))
        return {"accuracy": 1.0 / len(seen)}  # the first is the best

    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_steps": 2}
    args = GroundingConfig(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=2, **{**OPTIONS, "max_steps": 4, **chosen}
    )
    rows = Dataset.from_list(ROWS)
    given: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows, "processing_class": build_tokenizer()}
    GroundingTrainer(model, args, validate=validate, **given).train()
    for parameter, tensor in seen[0].items():
        torch.testing.assert_close(model.get_parameter(parameter), tensor, atol=0, rtol=0)


def test_a_named_adapter_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> tuple[Any, GroundingTrainer]:
        torch.manual_seed(1)
        model: Any = get_peft_model(build_base(), RiMConfig(num_blocks=3, r=4), adapter_name="mine")
        trainer = _trainer(folder, model)
        trainer.train(**options)
        return model, trainer

    expected, unbroken = run(tmp_path)
    assert (tmp_path / "checkpoint-3" / "mine" / "adapter_model.safetensors").is_file()
    found, resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, atol=0, rtol=0)
    assert _without_times(resumed.state.log_history) == _without_times(unbroken.state.log_history)


@pytest.mark.parametrize("step", [2, 4])
def test_a_stopped_run_has_the_figures_of_an_unbroken_one(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop lies within a logging interval (steps 1 to 3, then 4 to 6); figures are equal to the last bit."""
    options = {**OPTIONS, "logging_steps": 3, "save_steps": 100, "seed": 3}

    def run(folder: Path, **more: Any) -> CurriculumResult:
        stages = {
            "grounding": GroundingConfig(output_dir=str(folder / "grounding"), **options),
            "refinement": RefinementConfig(output_dir=str(folder / "refinement"), **options),
        }
        return train(folder, **stages, **more)[1]

    unbroken = run(tmp_path / "unbroken")
    SignalAtStep(monkeypatch, "grounding", step, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped")
    resumed = run(tmp_path / "stopped", resume=True)
    for stage, lines in unbroken.history.items():
        assert _without_times(resumed.history[stage]) == _without_times(lines)
    last = resumed.history["grounding"][-1]
    assert last["train_runtime"] == pytest.approx(last["train_seconds"], abs=0.1)  # of both parts


def test_callbacks_are_restored_without_loss_of_figures(tmp_path: Path) -> None:
    def run(folder: Path, *, resumed_from: Path | None = None) -> GroundingTrainer:
        model = build_rim(num_blocks=3, fresh=True)
        options = {"restore_callback_states_from_checkpoint": True, "eval_strategy": "steps", "eval_steps": 3}
        chosen = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
        trainer = _trainer(folder, model, **options, **chosen)
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=9))
        trainer.train(resume_from_checkpoint=None if resumed_from is None else str(resumed_from))
        return trainer

    unbroken = run(tmp_path)
    resumed = run(tmp_path, resumed_from=tmp_path / "checkpoint-3")
    expected, found = (
        [{name: value for name, value in line.items() if not name.startswith("eval_")} for line in lines]
        for lines in (_without_times(unbroken.state.log_history), _without_times(resumed.state.log_history))
    )
    assert found == expected
    assert resumed.state.log_history[-1]["train_seconds"] > resumed._clock.before > 0


def test_the_best_weights_come_back_from_a_moved_folder(tmp_path: Path) -> None:
    def run(folder: Path, **more: Any) -> Any:
        model = build_rim(num_blocks=3, fresh=True)
        options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4}
        chosen = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
        _trainer(folder, model, **options, **chosen).train(**more)
        return model

    expected = run(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    found = run(moved, resume_from_checkpoint=str(moved / "checkpoint-4"))
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, atol=0, rtol=0)


def _without_times(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    times = ("train_seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def test_a_block_chooses_the_best_checkpoint_and_stops_early(tmp_path: Path) -> None:
    """By the name that earlier versions gave its metric; their checkpoints have lines of these names."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    chosen = {"metric_for_best_model": "block_2/loss", **options}
    trainer = _trainer(tmp_path, build_rim(num_blocks=3, fresh=True), **chosen)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9))
    trainer.train()
    losses = [line["eval_loss_by_block/2"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.global_step == 4  # the second evaluation is not better by the threshold
    assert trainer.state.best_metric == min(losses)


def test_a_checkpoint_with_earlier_names_goes_on(tmp_path: Path) -> None:
    _trainer(tmp_path, build_rim(num_blocks=3, fresh=True), logging_steps=1, max_steps=3).train()
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    old = re.sub(r'"(\w+?)_by_block/(\d+)"', r'"block_\2/\1"', state.read_text(encoding="utf-8"))
    assert "block_1/loss" in old
    state.write_text(old, encoding="utf-8")
    (tmp_path / "checkpoint-3" / MANIFEST).unlink()  # as if it had been written so
    trainer = _trainer(tmp_path, build_rim(num_blocks=3, fresh=True), logging_steps=1, max_steps=5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    accuracies = [by_block(line, "token_accuracy") for line in trainer.state.log_history if "loss" in line]
    assert [3 in blocks for blocks in accuracies] == [True] * 5
    assert "block_1/loss" in trainer.state.log_history[0]


def test_samples_are_read_where_a_tracker_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    wandb: Any = ModuleType("wandb")
    wandb.run, wandb.Table, wandb.log = object(), lambda columns, data: data, logged.append
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    read: list[int] = []

    def read_samples(model: PeftModel) -> list[Sample]:
        assert not model.training
        read.append(1)
        return [Sample("1?", {"block 1": "2"}, answer="2", is_right=True)]

    rows = Dataset.from_list(ROWS)
    args = GroundingConfig(str(tmp_path), eval_strategy="steps", eval_steps=2, **{**OPTIONS, "max_steps": 4})
    given: dict[str, Any] = {"train_dataset": rows, "eval_dataset": {"a": rows, "b": rows}}
    trainer = GroundingTrainer(
        build_rim(num_blocks=3, fresh=True),
        args,
        processing_class=build_tokenizer(),
        read_samples=read_samples,
        **given,
    )
    trainer.evaluate()
    assert read == []  # nobody would see them
    trainer.args.report_to = ["wandb"]
    trainer.train()
    assert [line["train/global_step"] for line in logged] == [2, 4]  # once for both sets of rows
    assert logged[0]["eval/readouts"] == [["1?", "2", "2", "right"]]


def test_several_sets_of_evaluation_rows_keep_their_figures_apart(tmp_path: Path) -> None:
    args = GroundingConfig(str(tmp_path), **OPTIONS)
    sets = {"easy": Dataset.from_list(ROWS[:2]), "hard": Dataset.from_list(ROWS[2:])}
    given: dict[str, Any] = {"train_dataset": sets["easy"], "processing_class": build_tokenizer()}
    model = build_rim(num_blocks=3, fresh=True)
    together = GroundingTrainer(model, args, eval_dataset=sets, **given)
    together.evaluate()
    logged = {name: value for line in together.state.log_history for name, value in line.items()}
    for name, rows in sets.items():
        alone = GroundingTrainer(model, args, eval_dataset=rows, **given)
        alone.evaluate()
        expected = by_block(alone.state.log_history[-1], "loss", prefix="eval_")
        assert expected
        assert by_block(logged, "loss", prefix=f"eval_{name}_") == expected
    assert by_block(logged, "loss", prefix="eval_") == {}


@pytest.mark.parametrize("begun", [False, True])
def test_each_stage_is_a_run_in_wandb_unless_the_user_began_one(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    init, runs = wandb.init, []

    def begin(**given: Any) -> Any:
        runs.append(init(**given, dir=str(tmp_path), mode="offline"))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", begin)
    given = wandb.init(project="test") if begun else None
    options: dict[str, Any] = {**OPTIONS, "report_to": "wandb", "max_steps": 2}
    stages: dict[str, Any] = {
        "grounding": GroundingConfig(str(tmp_path / "grounding"), **options),
        "refinement": RefinementConfig(str(tmp_path / "refinement"), **options),
    }
    try:
        train(tmp_path, **stages)
        assert wandb.run is given
    finally:
        if wandb.run is not None:
            wandb.finish()
    assert len(runs) == len(list(tmp_path.glob("wandb/offline-run-*"))) == (1 if begun else 2)
