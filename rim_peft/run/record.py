"""How a run writes its files, and what it says about where it was made."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rim_peft.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
)


def write_files(folder: Path, save: Callable[[Path], None], *, last: str) -> None:
    """Let ``save`` write files to a folder of its own and move them into ``folder`` when all are complete.

    The file ``last`` is moved last, so that where it is the others are too.
    """
    for left_behind in folder.glob(".partial-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        save(Path(partial))
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)


def describe_versions() -> dict[str, str]:
    """Return the versions of Python, this package and those that it stands on."""
    versions = {"python": platform.python_version(), "rim-peft": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # bitsandbytes need not be there
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """Return what the run was made on."""
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return hardware
