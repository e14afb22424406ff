"""Two processes on a CPU, through the launcher and its files in recipes/accelerate, against one process alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from tests.integration.two_processes import SAMPLES, adapter_tensors, train_by_command, train_by_hand

ROOT = Path(__file__).parents[2]
STAGES = ("grounding", "refinement")
# Gradients are summed in another order, and Adam divides by their size, so that the smallest ones' noise counts.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """What one process alone ends with: the command's folder, and the adapter of the training by hand."""
    folder = tmp_path_factory.mktemp("alone")
    assert train_by_command(folder, num_processes=1) == 0
    by_hand = train_by_hand(folder / "rows", per_device_train_batch_size=SAMPLES)
    return folder / "run", adapter_tensors(by_hand)


def launch(config: str, folder: Path) -> str:
    """Run the module beside this one in two processes and return what they print."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launcher, "--config_file", f"recipes/accelerate/{config}.yaml"]
    process = subprocess.Popen(
        [*command, "-m", "tests.integration.two_processes", str(folder)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes
        process.communicate(timeout=60)
        raise
    assert process.returncode == 0, errors[-5000:]
    return printed


def losses(run: Path, stage: str) -> list[float]:
    """Return a stage's training losses, step by step."""
    lines = json.loads((run / stage / "history.json").read_text())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_equal_one(config: str, alone: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    printed = launch(config, tmp_path)
    expected, expected_by_hand = alone

    # A signal to one process stops both; the command goes on with the same result; and is refused where it has ended.
    for rank in (0, 1):
        assert json.loads((tmp_path / f"codes{rank}.json").read_text()) == [143, 0, 1]
    assert printed.count("adapter: ") == 1  # one process reports
    assert (tmp_path / "run" / "grounding" / "checkpoint-3").is_dir()  # the signal's; without it the end's is the first
    found = tmp_path / "run"
    for stage in STAGES:
        assert_close(losses(found, stage), losses(expected, stage), **CLOSE)
    for name in ("adapter_model.safetensors", "best.safetensors", *(f"{stage}/final.safetensors" for stage in STAGES)):
        assert_close(load_file(found / name), load_file(expected / name), **CLOSE)
    record = json.loads((found / "run.json").read_text())
    assert record["hardware"]["processes"] == 2
    assert record["metrics"]["validation"]["num_rows"] == 6

    by_rank = [load_file(tmp_path / "rows" / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert_close(by_rank[0], by_rank[1], atol=0, rtol=0)
    assert_close(by_rank[0], expected_by_hand, **CLOSE)
    by_length, resumed = (load_file(tmp_path / name / "rank0.safetensors") for name in ("lengths", "resumed"))
    assert_close(resumed, by_length, atol=0, rtol=0)
    # Batches by tokens differ in size between the processes, which must leave off with the same weights.
    by_tokens = [load_file(tmp_path / "tokens" / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert_close(by_tokens[0], by_tokens[1], atol=0, rtol=0)
    assert any(not tensor.equal(by_tokens[0][name]) for name, tensor in by_rank[0].items())
