"""Both stages in a row: what carries over, which weights are kept, and that a stopped run ends as an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from rim_peft import GroundingConfig, GroundingTrainer, RefinementConfig
from rim_peft.training.curriculum import CurriculumResult, Interrupted, run_curriculum
from tests.conftest import build_rim, build_tokenizer
from tests.training import assert_equal, trained

ROWS = [
    {"question": f"{a}+{b}+1", "steps": [str(a), str(a + b), str(a + b + 1)], "answer": str(a + b + 1)}
    for a in range(5)
    for b in range(4)
]


def train(
    folder: Path,
    *,
    resume: bool = False,
    streamed: bool = False,
    dropouts: tuple[float | None, float | None] = (None, 0.2),
    validate: Callable[[PeftModel], dict[str, float]] | None = None,
    **stages: Any,
) -> tuple[PeftModel, CurriculumResult]:
    """Run both stages, eight steps each, with dropout and shuffling, so that random state matters."""
    model = build_rim(num_blocks=3, fresh=True, lora_dropout=0.1)
    common: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "report_to": "none",
        "seed": 3,
        "disable_tqdm": True,
    }
    if validate is not None:
        common.update(eval_strategy="steps", eval_steps=2)
    grounding = GroundingConfig(output_dir=str(folder / "grounding"), dropout=dropouts[0], **common)
    refinement = RefinementConfig(output_dir=str(folder / "refinement"), dropout=dropouts[1], **common)
    rows = Dataset.from_list(ROWS)
    result = run_curriculum(
        model,
        build_tokenizer(),
        train_dataset=rows.to_iterable_dataset() if streamed else rows,
        eval_dataset=Dataset.from_list(ROWS[:3]),
        output_dir=folder,
        validate=validate,
        resume=resume,
        **{"grounding": grounding, "refinement": refinement, **stages},
    )
    return model, result


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    model, _ = train(tmp_path_factory.mktemp("unbroken"))
    return trained(model)


class SignalAtStep:
    """Sends this process a signal when a stage's trainer reaches a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: str, step: int, number: int) -> None:
        from rim_peft.training.readout_trainer import ReadoutTrainer

        original = ReadoutTrainer.training_step

        def training_step(trainer: ReadoutTrainer, *args: Any, **kwargs: Any) -> Tensor:
            if type(trainer).__name__.lower().startswith(stage) and trainer.state.global_step == step:
                monkeypatch.setattr(ReadoutTrainer, "training_step", original)
                os.kill(os.getpid(), number)
            return original(trainer, *args, **kwargs)

        monkeypatch.setattr(ReadoutTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("stage", "step", "number"),
    [("grounding", 4, signal.SIGTERM), ("grounding", 7, signal.SIGINT), ("refinement", 0, signal.SIGINT)],
)
def test_a_run_stopped_by_a_signal_resumes_to_the_same_weights(
    stage: str, step: int, number: int, unbroken: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    SignalAtStep(monkeypatch, stage, step, number)
    with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name}") as stopped:
        train(tmp_path)
    assert stopped.value.signal_number == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    model, _ = train(tmp_path, resume=True)
    assert_equal(trained(model), unbroken)


@pytest.mark.parametrize(
    ("options", "stage", "step"),
    [
        ({"dropouts": (0.3, None)}, "refinement", 2),  # stage 2 has the adapter's own dropout, not stage 1's
        ({"streamed": True}, "grounding", 6),  # twenty rows in batches of four: in the second pass
    ],
    ids=["dropout of stage 1 alone", "stream"],
)
def test_it_resumes_exactly_under(
    options: dict[str, Any], stage: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = train(tmp_path / "unbroken", **options)
    SignalAtStep(monkeypatch, stage, step, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", **options)
    model, _ = train(tmp_path / "stopped", resume=True, **options)
    assert_equal(trained(model), trained(expected))
    assert model.peft_config["default"].lora_dropout == 0.1


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(unbroken: dict[str, Tensor], tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything: what is on disk must do, a half-written checkpoint included."""
    script = (
        "import sys; from pathlib import Path; from tests.integration.test_curriculum import train; "
        "train(Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "grounding" / "checkpoint-3" / "trainer_state.json"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    half = tmp_path / "grounding" / "checkpoint-7"
    half.mkdir(exist_ok=True)
    (half / "trainer_state.json").write_text('{"global_step": 7')
    model, _ = train(tmp_path, resume=True)
    assert_equal(trained(model), unbroken)


def test_resuming_a_finished_run_changes_nothing(unbroken: dict[str, Tensor], tmp_path: Path) -> None:
    _, first = train(tmp_path)
    model, second = train(tmp_path, resume=True)
    assert_equal(trained(model), unbroken)
    assert second.history == first.history


def test_refinement_starts_from_grounding_with_a_fresh_schedule(tmp_path: Path) -> None:
    _, result = train(tmp_path)
    rates = [line["learning_rate"] for line in result.history["refinement"] if "learning_rate" in line]
    assert rates[0] == max(rates)
    after_stage_1 = load_file(tmp_path / "grounding" / "final.safetensors")
    after_stage_2 = load_file(tmp_path / "refinement" / "final.safetensors")
    assert after_stage_1.keys() == after_stage_2.keys()
    # Stage 2 alone moves the weights from where stage 1 left them: by about 8 steps of 1e-2 at most.
    moved = max(float((after_stage_1[name] - after_stage_2[name]).abs().max()) for name in after_stage_1)
    assert 0 < moved < 0.1


def test_either_stage_runs_alone(tmp_path: Path) -> None:
    _, only_grounding = train(tmp_path / "a", refinement=None)
    assert list(only_grounding.history) == ["grounding"]
    _, only_refinement = train(tmp_path / "b", grounding=None)
    assert list(only_refinement.history) == ["refinement"]


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """Scores by call: the third one is the best, so the weights seen at that call must come back."""
    seen: list[dict[str, Tensor]] = []
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.3, 0.3, 0.3, 0.3])

    def validate(model: PeftModel) -> dict[str, float]:
        assert not model.training
        seen.append(trained(model))
        return {"accuracy": next(scores)}

    model, result = train(tmp_path, validate=validate)
    assert result.best == {"stage": "grounding", "step": 6, "accuracy": 0.9}
    assert_equal(trained(model), seen[2])
    assert len(seen) == 8  # steps 2, 4, 6, 8 of each stage, the ends among them


def test_the_end_of_a_stage_competes_too(tmp_path: Path) -> None:
    scores = iter([0.1, 0.2, 0.3, 0.4, 0.5])

    def validate(model: PeftModel) -> dict[str, float]:
        return {"accuracy": next(scores)}

    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 8, "report_to": "none"}
    grounding = GroundingConfig(output_dir=str(tmp_path / "grounding"), gradient_checkpointing=False, **options)
    _, result = train(tmp_path, validate=validate, grounding=grounding, refinement=None)
    assert result.best == {"stage": "grounding", "step": 8, "accuracy": 0.3}
    history = json.loads((tmp_path / "grounding" / "history.json").read_text())
    assert [line["eval_accuracy"] for line in history if "eval_accuracy" in line] == [0.1, 0.2, 0.3]


def test_a_stopped_run_with_validation_keeps_the_same_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(model: PeftModel) -> dict[str, float]:
        total = sum(float(p.double().abs().sum()) for p in model.parameters() if p.requires_grad)
        return {"accuracy": (total * 1000) % 1}  # an arbitrary function of the weights

    expected_model, expected = train(tmp_path / "unbroken", validate=validate)
    SignalAtStep(monkeypatch, "refinement", 5, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", validate=validate)
    model, result = train(tmp_path / "stopped", validate=validate, resume=True)
    assert result.best == expected.best
    assert_equal(trained(model), trained(expected_model))


def test_a_best_that_is_not_scored_so_again_is_kept(tmp_path: Path) -> None:
    """A kill after step 6 was scored loses its line; on a GPU the same steps may get another score."""
    scores = iter([0.5, 0.9, "kill", 0.4, "kill", 0.3, *[0.1] * 6])

    def validate(model: PeftModel) -> dict[str, float]:
        if (score := next(scores)) == "kill":
            raise RuntimeError(score)
        return {"accuracy": float(score)}

    for resume in (False, True):
        with pytest.raises(RuntimeError, match="kill"):
            train(tmp_path, validate=validate, resume=resume)
    _, result = train(tmp_path, validate=validate, resume=True)
    assert result.best == {"stage": "grounding", "step": 4, "accuracy": 0.9}
    assert train(tmp_path, validate=validate, resume=True)[1].best == result.best


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"eval_strategy": "epoch"}, 2),  # five steps an epoch: within one
        ({"eval_strategy": "epoch"}, 4),  # its last step, which a score follows
        ({"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 10}, 9),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, 4),
        ({"eval_strategy": "no", "max_steps": -1, "num_train_epochs": 2}, 9),
    ],
    ids=["within an epoch", "end of an epoch", "last step", "score at the start", "length in epochs"],
)
def test_a_stop_adds_no_step_and_no_score(
    options: dict[str, Any], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validate(model: PeftModel) -> dict[str, float]:
        total = sum(float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad)
        return {"accuracy": (total * 1000) % 1}

    def run(folder: Path, *, resume: bool = False) -> tuple[dict[str, Tensor], dict[str, Any], list[Any]]:
        given: dict[str, Any] = {"max_steps": 8, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, **options}
        args = GroundingConfig(
            output_dir=str(folder / "grounding"),
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
            dropout=0.1,
            **given,
        )
        model, result = train(folder, grounding=args, refinement=None, validate=validate, resume=resume)
        scores = [
            (line["step"], line["eval_accuracy"]) for line in result.history["grounding"] if "eval_accuracy" in line
        ]
        return trained(model), result.best, scores

    expected = run(tmp_path / "unbroken")
    SignalAtStep(monkeypatch, "grounding", step, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped")
    found = run(tmp_path / "stopped", resume=True)
    assert found[1:] == expected[1:]
    assert_equal(found[0], expected[0])


def test_a_signal_while_the_last_weights_are_scored_stops_the_run(tmp_path: Path) -> None:
    def validate(model: PeftModel) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": 0.5}

    args = GroundingConfig(output_dir=str(tmp_path / "grounding"), max_steps=1, report_to="none", eval_strategy="no")
    with pytest.raises(Interrupted):
        train(tmp_path, grounding=args, refinement=None, validate=validate)
    _, result = train(tmp_path, grounding=args, refinement=None, validate=lambda model: {"accuracy": 0.0}, resume=True)
    assert result.best == {"stage": "grounding", "step": 1, "accuracy": 0.5}


def test_a_trainer_takes_no_damaged_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trainer() -> GroundingTrainer:
        args = GroundingConfig(output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to="none", disable_tqdm=True)
        rows = Dataset.from_list(ROWS)
        return GroundingTrainer(build_rim(fresh=True), args, train_dataset=rows, processing_class=build_tokenizer())

    trainer().train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: must be intact, got .*checkpoint-2.*optimizer.pt is m"
    ):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-1" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="resume_from_checkpoint: needs an intact checkpoint"):
        trainer().train(resume_from_checkpoint=True)
    assert "checkpoint-1: scheduler.pt has 0 bytes" in caplog.text


def test_another_runs_work_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: must hold no other run's work, got .*resume=True"):
        train(tmp_path)


def test_a_score_named_accuracy_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validate: must return a score named 'accuracy'"):
        train(tmp_path, validate=lambda model: {"f1": 0.5})


def test_checkpoints_without_the_optimiser_are_refused(tmp_path: Path) -> None:
    grounding = GroundingConfig(output_dir=str(tmp_path / "grounding"), save_only_model=True)
    with pytest.raises(ValueError, match="save_only_model: must be False"):
        train(tmp_path, grounding=grounding)
