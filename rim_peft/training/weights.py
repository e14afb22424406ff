"""Adapter weights on disk while a curriculum runs: the best, a finished stage's, and which checkpoint is whole."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rim_peft.training.files import find_damage, replace_file
from rim_peft.training.processes import on_main
from rim_peft.training.sharding import fill_adapter, gather_adapter

logger = logging.getLogger(__name__)

SCORE = "accuracy"
"""The name among ``validate``'s scores by which the best adapter is chosen; larger is better."""


class BestWeights:
    """The best adapter so far and its score, in one file that is replaced at once.

    Among equals the later one is the best, in whichever order they come: a run that is resumed offers some again.

    Args:
        path: the file.
        stages: names of the run's stages, in order.
    """

    def __init__(self, path: Path, stages: Sequence[str]) -> None:
        self.path = path
        self._stages = stages

    def read(self) -> dict[str, Any]:
        """Return stage, step and score of the weights in the file.

        Raises:
            ValueError: it is damaged.
        """
        return self._open()[0]

    def offer(self, model: PeftModel, score: float, *, stage: str, step: int) -> None:
        """Keep the model's adapter if it is at least as good as the one in the file; every process must call it."""
        new = {"stage": stage, "step": step, SCORE: score}
        if on_main(lambda: not self.path.exists() or self._rank(new) >= self._rank(self.read())):
            save_weights(model, self.path, best=new)

    def load(self, model: PeftModel) -> dict[str, Any]:
        """Read the weights into the model's active adapter, and return what :meth:`read` does."""
        best, tensors = self._open()
        fill_adapter(model, tensors)
        return best

    def check(self, scores: Iterable[float]) -> None:
        """Check that the file holds the best of a run that goes on.

        Args:
            scores: of all that the run has offered up to where it goes on.

        Raises:
            ValueError: it is missing, damaged, or of another run.
        """
        least = max((score for score in scores if score == score), default=None)  # a NaN is never the best
        if least is None:
            return
        remedy = "Put it back, or train in another folder."
        if not self.path.exists():
            raise ValueError(f"{self.path}: is missing, and held the best adapter of the run so far. {remedy}")
        if (found := self.read()[SCORE]) < least:
            raise ValueError(
                f"{self.path}: must hold the best adapter of the run so far, with {SCORE} {least}, got one with "
                f"{found}. {remedy}"
            )

    def _rank(self, best: dict[str, Any]) -> tuple[float, int, int]:
        at = self._stages.index(best["stage"]) if best["stage"] in self._stages else -1
        return best[SCORE], at, best["step"]

    def _open(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(self.path, framework="pt") as file:
                best = json.loads(file.metadata()["best"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            kept = best.pop("sha256", None)  # which earlier versions did not write
            if kept not in (None, _digest(tensors)):
                raise ValueError("other contents than were written")
            self._rank(best)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path}: is damaged ({_first_line(error)}), and held the best adapter of the run so far. Put a "
                "copy back, or train in another folder."
            ) from error
        return best, tensors


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint that is whole, None if there is none; says which ones are not, and why."""
    numbered = [
        (int(found[1]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]
    for _, checkpoint in sorted(numbered, reverse=True):
        if (damage := check_checkpoint(checkpoint)) is None:
            return checkpoint
        logger.warning("%s: %s. It is passed over.", checkpoint, damage)
    return None


def check_checkpoint(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is whole."""
    names = ["trainer_state.json"]  # which the Trainer writes last
    if not (checkpoint / "latest").exists():  # where DeepSpeed's own files are
        adapters = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("adapter_model.*")]
        states = [path.name for path in checkpoint.glob("rng_state*.pth")]
        names += [*(adapters or ["adapter_model.safetensors"]), "optimizer.pt", "scheduler.pt"]
        names += states or ["rng_state.pth"]
    return find_damage(checkpoint, names)


def save_weights(model: PeftModel, path: Path, *, best: dict[str, Any] | None = None) -> None:
    """Write the active adapter's tensors to one file, at once; every process must call it, and the main one writes.

    Args:
        model: the model.
        path: the file.
        best: what to note in it, beside a hash of the tensors.
    """
    gathered = gather_adapter(model)

    def write() -> None:
        state = get_peft_model_state_dict(model, state_dict=gathered, adapter_name=model.active_adapter)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        # One entry at most: safetensors writes several in any order, and equal runs are to leave equal bytes.
        note = {"format": "pt"} if best is None else {"best": json.dumps({**best, "sha256": _digest(tensors)})}
        replace_file(path, lambda partial: save_file(tensors, partial, metadata=note))

    on_main(write)


def load_weights(model: PeftModel, path: Path) -> None:
    """Read what :func:`save_weights` wrote into the active adapter."""
    fill_adapter(model, load_file(path))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
