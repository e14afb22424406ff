"""Adapter weights on disk while a curriculum runs. Files are replaced at once: a kill leaves the old or the new one."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rim_peft.training.processes import on_main
from rim_peft.training.sharding import fill_adapter, gather_adapter
from rim_peft.tuner.files import not_finite, read_tensors

logger = logging.getLogger(__name__)

SCORE = "accuracy"
"""The name among ``validate``'s scores by which the best adapter is chosen; larger is better."""

BEST = "best.safetensors"
_ANEW = "Train again in another output_dir."
AGAIN = "Delete {path} and go on with resume=true: the stage then ends again from its last checkpoint."


class BestWeights:
    """The best adapter so far and its score, in one file that is replaced at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return stage, step and score of the weights in the file.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                best: dict[str, Any] = json.loads(file.metadata()["best"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            best = {}
        if not {"stage", "step", SCORE} <= {*best}:
            raise ValueError(
                f"{self.path}: must hold the best weights so far and their score, and is damaged or cut off. {_ANEW}"
            )
        return best

    def offer(self, model: PeftModel, score: float, *, stage: str, step: int) -> None:
        """Keep the model's adapter if it is at least as good as the one in the file; every process must call it.

        Raises:
            ValueError: the score is no finite number, or the weights are not finite.
        """
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(
                f"validate: {SCORE} must be a finite number, since it chooses the best adapter, got {score!r} at step "
                f"{step} of {stage}. Correct what validate returns."
            )
        if on_main(lambda: not self.path.exists() or score >= self.read()[SCORE]):
            save_weights(model, self.path, {"best": json.dumps({"stage": stage, "step": step, SCORE: score})})


def last_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint that was written to its end, None if there is none."""
    checkpoints = sorted(
        Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    for checkpoint in reversed(checkpoints):
        try:
            # The Trainer writes this file last, so a checkpoint cut off by a kill lacks it or holds half of it.
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if (found := _ruined(checkpoint)) is not None:
            logger.warning("%s is passed over: %s.", checkpoint, found)
            continue
        return str(checkpoint)
    return None


def _ruined(checkpoint: Path) -> str | None:
    """Return which weight of a checkpoint is not finite; None if all are, or cannot be read."""
    for path in sorted(checkpoint.rglob("adapter_model.safetensors")):
        try:
            if (found := not_finite(load_file(path))) is not None:
                return found
        except (OSError, SafetensorError):
            return None
    return None


def save_weights(model: PeftModel, path: Path, metadata: dict[str, str]) -> None:
    """Write the active adapter's tensors to one file, at once; every process must call it, and the main one writes."""
    gathered = gather_adapter(model)

    def write() -> None:
        state = get_peft_model_state_dict(model, state_dict=gathered, adapter_name=model.active_adapter)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        if (found := not_finite(tensors)) is not None:
            raise ValueError(
                f"{path}: is not written, since weights must be finite to be kept, {found}: the training has diverged. "
                "Lower learning_rate, and start again in another output_dir."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        temporary.replace(path)

    on_main(write)


def load_weights(model: PeftModel, path: Path) -> None:
    """Read what :func:`save_weights` wrote into the active adapter.

    Raises:
        ValueError: the file is damaged, not finite, or another adapter's.
    """
    remedy = _ANEW if path.name == BEST else AGAIN.format(path=path)
    tensors = read_tensors(path, remedy=remedy)
    known = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    found, wanted = ({name: tuple(t.shape) for name, t in part.items()} for part in (tensors, known))
    if wrong := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        raise ValueError(
            f"{path}: must hold the adapter's tensors, {wrong[0]} is {wanted.get(wrong[0], 'none')} in the adapter and "
            f"{found.get(wrong[0], 'none')} in the file. {remedy}"
        )
    fill_adapter(model, tensors)


def write_text(path: Path, text: str) -> None:
    """Write a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
