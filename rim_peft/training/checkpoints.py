"""Checkpoints independent of the number of processes, files of finished stages, the best and the last weights."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rim_peft.training.distributed import fill_adapter, gather_adapter, gather_optimizer, on_main
from rim_peft.training.files import MANIFEST, find_damage, replace_file, write_manifest, write_text
from rim_peft.tuner.files import brief
from rim_peft.tuner.tensors import not_finite, read_tensors, seal_tensors
from rim_peft.values import cut, is_number

ADAPTER_WEIGHTS = "adapter_model.safetensors"

logger = logging.getLogger(__name__)

SCORE = "accuracy"
"""The score of ``validate`` that chooses the best adapter; larger is better."""


class BestWeights:
    """The best adapter so far and its score, in one file that is replaced atomically.

    Among equal scores the later step wins, in whatever order they are offered: a resumed run offers some again.

    Args:
        stages: names of the run's stages, in order.
    """

    def __init__(self, path: Path, stages: Sequence[str]) -> None:
        self.path = path
        self._stages = stages
        self._lost = path.with_name(f".{path.stem}.lost.json")

    def begin(self) -> None:
        """Delete the note that an earlier run left beside the file."""
        self._lost.unlink(missing_ok=True)

    def read(self) -> dict[str, Any]:
        """Return stage, step and score of the weights in the file.

        Raises:
            ValueError: the file is damaged.
        """
        return self._open()[0]

    def offer(self, model: PeftModel, score: float, *, stage: str, step: int) -> None:
        """Keep the model's adapter if it is at least as good as the one in the file; every process must call it.

        Raises:
            ValueError: the score is not a finite number, or the weights are not finite.
        """
        if not is_number(score) or not math.isfinite(score):
            raise ValueError(
                f"validate: {SCORE} must be a finite number, since it chooses the best adapter, got {score!r} at step "
                f"{step} of {stage}. Correct what validate returns."
            )
        new = {"stage": stage, "step": step, SCORE: score}
        if on_main(lambda: not self.path.exists() or self._rank(new) >= self._rank(self.read())):
            save_weights(model, self.path, best=new)

    def load(self, model: PeftModel) -> dict[str, Any]:
        """Load the weights into the model's active adapter; returns the same as :meth:`read`."""
        best, tensors = self._open()
        fill_adapter(model, tensors)
        return best

    def check(self, offered: Iterable[dict[str, Any]], *, at: tuple[str, float]) -> None:
        """Check that the file holds the best adapter of a run that is being resumed.

        Args:
            offered: stage, step and score of everything that the run offered before the point where it resumes.
            at: stage and step where it resumes. The best may also be from later steps, whose log a kill lost.

        Raises:
            ValueError: the file is missing, damaged, or from another run.
        """
        lost = self._read_lost()
        known = (entry for entry in (*offered, *lost) if math.isfinite(entry[SCORE]))
        best = max(known, key=self._rank, default=None)
        if best is None and not self.path.exists():
            return
        remedy = "Put it back, or train in another folder."
        if not self.path.exists():
            raise ValueError(f"{self.path}: is missing, and held the best adapter of the run so far. {remedy}")
        found = self.read()
        if found == best:
            return
        is_later = self._place(found) >= self._place({"stage": at[0], "step": at[1]})
        if not (is_later and (best is None or self._rank(found) >= self._rank(best))):
            expected = "none yet" if best is None else _describe(best)
            raise ValueError(
                f"{self.path}: must hold the best adapter of the run so far, {expected}, got {_describe(found)}. "
                f"{remedy}"
            )
        # The file's weights are from steps that the log lost. On a GPU these steps may get another score when they
        # are repeated, so no log would ever name the file's score: note it.
        write_text(self._lost, json.dumps([*lost, found]))

    def _read_lost(self) -> list[dict[str, Any]]:
        """Return stage, step and score of weights that were offered but are in no log."""
        try:
            lost: list[dict[str, Any]] = json.loads(self._lost.read_text(encoding="utf-8"))
            return sorted(lost, key=self._rank)
        except (OSError, ValueError, KeyError, TypeError):  # missing or unreadable: only the log counts
            return []

    def _rank(self, best: dict[str, Any]) -> tuple[float, int, float]:
        return best[SCORE], *self._place(best)

    def _place(self, best: dict[str, Any]) -> tuple[int, float]:
        return self._stages.index(best["stage"]) if best["stage"] in self._stages else -1, best["step"]

    def _open(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            tensors = read_tensors(self.path)
            with safe_open(self.path, framework="pt") as file:
                best = json.loads(file.metadata()["best"])
            self._rank(best)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path}: is damaged ({brief(error)}), and held the best adapter of the run so far. Put a "
                "copy back, or train in another folder."
            ) from error
        return best, tensors


def _describe(best: dict[str, Any]) -> str:
    return f"{SCORE} {best[SCORE]} at step {best['step']} of {cut(best['stage'], most=60)}"


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest intact checkpoint, None if there is none; logs which ones are damaged, and how."""
    numbered = [
        (int(found[1]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]
    for _, checkpoint in sorted(numbered, reverse=True):
        if (damage := check_checkpoint(checkpoint)) is None:
            return checkpoint
        logger.warning("%s: %s. It is skipped.", checkpoint, damage)
    return None


def check_checkpoint(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is intact and its weights are finite."""
    adapters = sorted(checkpoint.rglob("adapter_model.*"))
    names = ["trainer_state.json"]  # the Trainer writes it last
    if not (checkpoint / "latest").exists():  # DeepSpeed writes it, and its own files instead of these
        states = [path.name for path in checkpoint.glob("rng_state*.pth")]
        names += [path.relative_to(checkpoint).as_posix() for path in adapters] or ["adapter_model.safetensors"]
        names += ["optimizer.pt", "scheduler.pt", *(states or ["rng_state.pth"])]
    if (damage := find_damage(checkpoint, names)) is not None:
        return damage
    ruined = (not_finite(load_file(path)) for path in adapters if path.suffix == ".safetensors")
    return next((found for found in ruined if found is not None), None)


def save_weights(model: PeftModel, path: Path, *, best: dict[str, Any] | None = None) -> None:
    """Write the active adapter's tensors to one file, atomically; every process must call it, the main one writes.

    Args:
        best: stage, step and score to note in the file.

    Raises:
        ValueError: the weights are not finite.
    """
    gathered = gather_adapter(model)

    def write() -> None:
        state = get_peft_model_state_dict(model, state_dict=gathered, adapter_name=model.active_adapter)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        if (found := not_finite(tensors)) is not None:
            raise ValueError(
                f"{path}: not written, since weights must be finite, {found}: the training has diverged. "
                "Lower learning_rate, and start again in another output_dir."
            )
        note = {"format": "pt", **({} if best is None else {"best": json.dumps(best)})}

        def save(partial: Path) -> None:
            save_file(tensors, partial, metadata=note)
            seal_tensors(partial)

        replace_file(path, save)

    on_main(write)


def load_weights(model: PeftModel, path: Path) -> None:
    """Load a file of :func:`save_weights` into the active adapter.

    Raises:
        ValueError: the file is damaged or belongs to another adapter; the model does not change.
    """
    fill_adapter(model, read_tensors(path))


FINAL, HISTORY, MOMENTS = "final.safetensors", "history.json", "optimizer.pt"
"""Files of a finished stage; the optimiser's moments only if the next stage continues with them."""


def mark_finished(
    folder: Path, names: Sequence[str], model: PeftModel, optimizer: Any, log: Sequence[dict[str, float]]
) -> None:
    """Write a finished stage's files; every process must call it."""
    state = gather_optimizer(optimizer) if MOMENTS in names else None

    def write() -> None:
        if state is not None:
            replace_file(folder / MOMENTS, partial(torch.save, state))  # loaded with weights_only=True
        write_text(folder / HISTORY, json.dumps(log))

    on_main(write)
    # Last but for the manifest: the weights mark the stage as finished.
    save_weights(model, folder / FINAL)
    on_main(lambda: write_manifest(folder, names))


def read_finished(folder: Path, names: Sequence[str]) -> list[dict[str, float]] | None:
    """Return the log lines of a finished stage, None if it is not finished or its files are damaged."""
    marks = folder / MANIFEST, folder / FINAL
    if not any(mark.exists() for mark in marks):
        return None
    if (damage := find_damage(folder, names)) is not None:
        logger.warning("%s: %s. The stage resumes from its last checkpoint, to the same weights.", folder, damage)
        for mark in marks:
            mark.unlink(missing_ok=True)
        return None
    lines: list[dict[str, float]] = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    return lines


def read_log(checkpoint: Path | None) -> tuple[list[dict[str, float]], int]:
    """Return a checkpoint's log lines and step; no lines and 0 without a checkpoint."""
    if checkpoint is None:
        return [], 0
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.log_history, state.global_step


def offered(history: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Return stage, step and score of all weights offered as the best."""
    return [
        {"stage": stage, "step": line["step"], SCORE: line[f"eval_{SCORE}"]}
        for stage, lines in history.items()
        for line in lines
        if f"eval_{SCORE}" in line
    ]


def check_folders(folders: Sequence[Path], *, resume: bool) -> None:
    """Refuse folders that hold another run's work, since resuming would mistake it for this run's."""
    patterns = ("*.safetensors", f"{PREFIX_CHECKPOINT_DIR}-*")
    found = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    if found and not resume:
        raise ValueError(
            f"output_dir: must hold no other run's work, got {found[0]}. Give another folder, or resume=True to resume."
        )
