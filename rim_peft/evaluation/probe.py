"""A linear probe: is a block's readout right, to be read from the block's state alone?"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rim_peft.evaluation.readouts import BlockReadouts

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the ridge penalty that are tried."""
NUM_FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """Log-odds of "this readout is right", linear in the state at the block's end, with an offset for each block.

    One direction serves all blocks, since what makes an answer right is not a matter of where it stands; the offsets
    hold how often each block is right.

    Attributes:
        weight: (H,) float32.
        offsets: (K,) float32.
        mean: (H,) float32, of the states that it was trained on.
        scale: (H,) float32, their standard deviation.
        num_training_rows: questions that it was trained on.
        strength: inverse strength of the penalty, chosen by cross-validation over these questions.
    """

    weight: Tensor
    offsets: Tensor
    mean: Tensor
    scale: Tensor
    num_training_rows: int
    strength: float

    def scores(self, states: Tensor) -> NDArray[np.float64]:
        """Return the (N, K) log-odds for (N, K, H) states.

        Raises:
            ValueError: the states have another K or H than those that it was trained on.
        """
        expected = (len(self.offsets), len(self.weight))
        if tuple(states.shape[1:]) != expected:
            raise ValueError(f"states: must be (N, {expected[0]}, {expected[1]}), got {tuple(states.shape)}.")
        standard = (states - self.mean) / self.scale
        return np.asarray((standard @ self.weight + self.offsets).double().numpy())

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in ("weight", "offsets", "mean", "scale")}
        rest = {"num_training_rows": self.num_training_rows, "strength": self.strength}
        save_file(tensors, path, metadata={"probe": json.dumps(rest)})

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds no probe.
        """
        with safe_open(path, framework="pt") as file:
            rest = (file.metadata() or {}).get("probe")
            if rest is None:
                raise ValueError(f"path: must be a probe's file, got {path}, which holds none.")
            return cls(**{name: file.get_tensor(name) for name in file.keys()}, **json.loads(rest))  # noqa: SIM118


def train_probe(readouts: BlockReadouts) -> Probe | None:
    """Train a probe on the readouts of rows that serve for selection, never of test rows.

    Args:
        readouts: of at least ten questions.

    Returns:
        The probe; None where all readouts are right or all are wrong, which leaves nothing to tell apart.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: there are too few questions.
    """
    linear_model, model_selection = _sklearn()
    num_rows, num_blocks = readouts.right.shape
    if num_rows < 2 * NUM_FOLDS:
        raise ValueError(f"readouts: a probe needs at least {2 * NUM_FOLDS} questions, got {num_rows}.")
    right = readouts.right.reshape(-1)
    if right.all() or not right.any():
        return None
    states = readouts.states.reshape(num_rows * num_blocks, -1)
    mean, scale = states.mean(0), states.std(0).clamp(min=1e-6)
    blocks = np.tile(np.eye(num_blocks), (num_rows, 1))
    features = np.concatenate([((states - mean) / scale).double().numpy(), blocks], axis=1)
    questions = np.repeat(np.arange(num_rows), num_blocks)  # the blocks of one question are not independent
    search = model_selection.GridSearchCV(
        linear_model.LogisticRegression(max_iter=1000),
        {"C": list(STRENGTHS)},
        scoring="neg_log_loss",
        cv=model_selection.GroupKFold(NUM_FOLDS),
        error_score=-np.inf,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold may lack a class; its score then is what error_score says
        search.fit(features, right, groups=questions)
    fitted: Any = search.best_estimator_
    weights = torch.tensor(fitted.coef_[0], dtype=torch.float32)
    size = len(mean)
    offsets = weights[size:] + float(fitted.intercept_[0])
    return Probe(weights[:size], offsets, mean, scale, num_rows, float(search.best_params_["C"]))


def auroc_by_block(probe: Probe, readouts: BlockReadouts) -> list[float | None]:
    """Return for every block how well the probe orders its right readouts above its wrong ones: 0.5 is chance.

    Returns:
        K areas under the ROC curve; None where a block is all right or all wrong.

    Raises:
        ImportError: scikit-learn is missing.
    """
    _sklearn()
    from sklearn.metrics import roc_auc_score

    scores = probe.scores(readouts.states)
    areas: list[float | None] = []
    for right, score in zip(readouts.right.T, scores.T, strict=True):
        is_mixed = right.any() and not right.all()
        areas.append(round(float(roc_auc_score(right, score)), 6) if is_mixed else None)
    return areas


def gap_closed(final: float, any_block: float, chosen: float) -> float | None:
    """Return which share of the gap between final-block and any-block accuracy a choice closes.

    >>> gap_closed(0.4, 0.6, 0.5), gap_closed(0.6, 0.6, 0.6)
    (0.5, None)
    """
    gap = any_block - final
    return round((chosen - final) / gap, 6) if gap > 0 else None


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import linear_model, model_selection
    except ImportError as error:
        raise ImportError(
            "scikit-learn: is needed for the probe and is not installed. Install it: pip install 'rim-peft[compare]'."
        ) from error
    return linear_model, model_selection
