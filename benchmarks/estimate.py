"""Compare the peak memory that ``rim-peft check`` estimates with that of a training process.

The benchmark starts the measured process as ``python -m benchmarks.estimate RECIPE WARM_UP RESULT``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from benchmarks.measure import Spread
from benchmarks.models import CONFIGS, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, within
from rim_peft.data.examples import Templates
from rim_peft.recipe import load_recipe
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run import train
from rim_peft.run.built_base import build_base
from rim_peft.run.preflight import Preflight
from rim_peft.tasks import get_task

_MIB = 2**20
_MADV_PAGEOUT = 21
_CLONE = Path(__file__).parents[1]
_TASK: dict[str, Any] = {"lengths": [4], "num_rows": 256, "distractors": 4}
"""Stories of one length, so that each batch is about as long as the longest one, which the estimate is for."""
_GIVE_BACK = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**17))
"""glibc keeps small and middle-sized freed pieces unless told to return them. With these settings, the resident set of
a process is the memory in use; without them the same training takes up to twice as much on a CPU."""


@benchmark("memory_estimate", "peak memory of a training: what rim-peft check says against what a process takes")
def estimate(settings: Settings) -> Iterator[Row]:
    """Train both stages of a recipe in a separate process, and compare its peak with the estimate."""
    cases: list[tuple[str, str | None, bool, int]] = settings.choose(
        quick=[("tiny", "nf4", True, 8)],
        cpu=[
            ("small", None, False, 16),
            ("small", None, True, 64),
            ("small", "nf4", False, 16),
            ("wide", None, False, 16),
            ("wide", "nf4", True, 32),
            ("wide", "int8", False, 8),
            ("gpt2-124m", None, True, 4),
        ],
        cuda=[("gpt2-124m", None, False, 32), ("llama-3.2-1b", "nf4", True, 32), ("llama-3.2-3b", "nf4", True, 32)],
    )
    for base, quantization, checkpointing, batch in cases:
        case = {"base": base, "weights": quantization or "fp32", "checkpointing": checkpointing, "batch": batch}
        settings.tell(", ".join(f"{name}={value}" for name, value in case.items()))
        with tempfile.TemporaryDirectory(prefix="rim-peft-benchmarks-") as name:
            folder = Path(name)
            write = partial(_write_recipe, quantization=quantization, checkpointing=checkpointing)
            recipe = write(folder / "measured", base, rank=lora_rank(settings), batch=batch)
            warm_up = write(folder / "warm-up", "tiny", rank=2, batch=2)
            found = Preflight(device=settings.device).check(load_recipe(recipe))
            if found.peak is None:
                raise RuntimeError(f"memory_estimate: {recipe}: {found.errors or found.not_checked}")
            measured = _measure(recipe, warm_up, folder / "measured.json")
        ratio = found.peak / measured
        last = found.stages[-1].memory
        parts = {} if last is None else {"weights": last.weights, "adapter": last.adapter, "step": last.step}
        yield Row(
            benchmark="memory_estimate",
            case=case,
            ways=(_mebibytes("estimated", found.peak), _mebibytes("measured", measured)),
            figure=Spread(ratio, ratio, ratio),
            figure_name="estimated / measured",
            bound=1.0,
            bound_text="the measured peak itself",
            target=within(0.15),
            note=", ".join(f"{part} {size / _MIB:.1f}" for part, size in parts.items()) + " MiB of the estimate",
        )


def worker(recipe: str, warm_up: str, result: Path) -> None:
    """Train a recipe, and write the peak memory growth of this process in bytes, without loading and saving.

    On CUDA, this is the peak of the allocator. On the CPU, it is the growth of the resident set after a small training,
    which loaded every library and started every thread.
    """
    train(load_recipe(warm_up))
    gc.collect()
    peak: Any = _CudaPeak() if torch.cuda.is_available() else _ResidentPeak()
    DEFAULT_CALLBACKS.append(peak)
    train(load_recipe(recipe))
    result.write_text(json.dumps({"peak": peak.most}), encoding="utf-8")


class _CudaPeak(TrainerCallback):
    """Records the allocator's peak in a stage."""

    most = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.most = max(self.most, torch.cuda.max_memory_allocated())


class _ResidentPeak(TrainerCallback):
    """Records the peak growth of the resident set in a stage, from its size at construction."""

    most = 0

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.malloc_trim(0)
        self._before = _status("VmRSS")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Weights are in the base's file, mapped into memory. Pages read only for quantisation are no longer needed and
        # would be freed under memory pressure; free them now, and pages in use come back.
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if line.endswith(".safetensors"):
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.most = max(self.most, _status("VmHWM") - self._before)


def _measure(recipe: Path, warm_up: Path, result: Path) -> int:
    command = [sys.executable, "-m", "benchmarks.estimate", str(recipe), str(warm_up), str(result)]
    environment = {**os.environ, **_GIVE_BACK, "HF_DATASETS_CACHE": str(result.parent / "datasets")}
    done = subprocess.run(command, cwd=_CLONE, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"memory_estimate: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(json.loads(result.read_text(encoding="utf-8"))["peak"])


def _write_recipe(
    folder: Path, base: str, *, rank: int, quantization: str | None, checkpointing: bool, batch: int
) -> Path:
    """Write a base with random weights, and a recipe that trains both stages on it for two steps each."""
    folder.mkdir()
    config = CONFIGS[base]().to_dict()
    rows = get_task("potions", **_TASK).load("train")
    config["vocab_size"] = max(config["vocab_size"], 512)  # room for each byte
    build_base(config, rows, templates=Templates(), seed=0, folder=folder / "base")
    stage = {
        "max_steps": 2,
        "per_device_train_batch_size": batch,
        "gradient_checkpointing": checkpointing,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "base"), "quantization": quantization},
        "adapter": {"num_blocks": 8, "r": rank},
        "data": {"task": "potions", "options": _TASK, "validation_rows": 0},
        "grounding": stage,
        "refinement": stage,
    }
    path = folder / "recipe.yaml"
    path.write_text(write_yaml(recipe), encoding="utf-8")
    return path


def _mebibytes(name: str, size: int) -> Measured:
    return Measured(name, Spread(size / _MIB, size / _MIB, size / _MIB), "MiB")


def _status(field: str) -> int:
    """Return a figure of this process in bytes, from its status in Linux."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"memory_estimate: /proc/self/status has no {field}; a CPU's peak is measured on Linux.")


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
