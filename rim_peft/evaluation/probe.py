"""A linear probe that tells from the states at the blocks' ends which readouts are right."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from rim_peft.evaluation.readouts import BlockReadouts
from rim_peft.tuner.files import read_object

logger = logging.getLogger(__name__)

WEIGHTS_FILE, METADATA_FILE = "probe.safetensors", "probe.json"
FORMAT = 2
_ARRAYS = ("weight", "bias", "mean", "scale")

INVERSE_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for cross-validation: scikit-learn's ``C``, the inverse strength of the L2 penalty."""
NUM_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Probe:
    """Log-odds that block k's readout is right: ``sum_j weight[k, j] · (state[j] - mean[j]) / scale[j] + bias[k]``.

    Each block has its own weights on the states of all blocks, because what shows that a block is right may be in
    another block: that the chain continued after it, or had ended before.

    Attributes:
        weight: (K, K, H) float64, for each judged block the weights on each block's state.
        bias: (K,) float64.
        mean: (K, H) float64, mean state of each block on the selection split.
        scale: (K, H) float64, their standard deviations; 1 where they are 0.
        inverse_strength: chosen ``C``; None if all readouts of the selection split were right, or all wrong. Then the
            probe knows nothing: it scores all readouts alike, and choosing by it means choosing the last block.
        num_training_rows: questions of the selection split; each contributed K readouts.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    inverse_strength: float | None
    num_training_rows: int

    @property
    def num_blocks(self) -> int:
        """K, the blocks that the probe was fitted on."""
        return len(self.bias)

    def scores(self, states: Tensor) -> NDArray[np.float64]:
        """Return (N, K) log-odds that the readouts are right.

        Args:
            states: (N, K, H) last layer's states at the blocks' ends, block 1 first.

        Raises:
            ValueError: the width or number of blocks differs from the states that the probe was fitted on.
        """
        if states.ndim != 3 or tuple(states.shape[1:]) != self.mean.shape:
            raise ValueError(
                f"states: must be (questions, {', '.join(str(size) for size in self.mean.shape)}), blocks and width of "
                f"what this probe was fitted on, got {tuple(states.shape)}. Fit a probe on this adapter with the same "
                "number of blocks."
            )
        features = (states.double().numpy() - self.mean) / self.scale
        scores: NDArray[np.float64] = np.einsum("njh,kjh->nk", features, self.weight) + self.bias
        return scores

    def save(self, folder: str | Path) -> None:
        """Write ``probe.safetensors`` and ``probe.json`` into a folder, such as an adapter's."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name) for name in _ARRAYS}, folder / WEIGHTS_FILE)
        metadata = {
            "format": FORMAT,
            "kind": "for each block a logistic regression on the last layer's states at all blocks' ends",
            "num_blocks": self.num_blocks,
            "hidden_size": self.mean.shape[1],
            "inverse_strength": self.inverse_strength,
            "num_training_rows": self.num_training_rows,
        }
        (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Probe:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no probe.
            ValueError: the probe was written by another version of this package.
        """
        weights, metadata = Path(folder) / WEIGHTS_FILE, Path(folder) / METADATA_FILE
        if not weights.is_file() or not metadata.is_file():
            raise FileNotFoundError(
                f"folder: {folder} must hold {WEIGHTS_FILE} and {METADATA_FILE}. Save a probe there."
            )
        known = read_object(
            metadata,
            keys=("format", "inverse_strength", "num_training_rows"),
            remedy="Fit the probe again, or copy it again.",
        )
        if known["format"] != FORMAT:
            raise ValueError(
                f"folder: {metadata} must have format {FORMAT}, got {known['format']}. Fit the probe again, or load it "
                "with the version of rim-peft that wrote it."
            )
        return cls(
            **load_file(weights),
            inverse_strength=known["inverse_strength"],
            num_training_rows=known["num_training_rows"],
        )


def fit_probe(selection: BlockReadouts) -> Probe:
    """Fit a probe on the selection split's readouts, never on those that it will choose from.

    Logistic regression with an L2 penalty; cross-validation chooses the strength with the lowest log loss. All readouts
    of a question are in the same fold, since their states are nearly copies of each other.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    right, states = selection.right, selection.states
    if right.all() or not right.any():
        logger.warning(
            "probe: every readout of the selection split is %s, so there is nothing to learn. The probe scores all "
            "readouts alike; choosing by it is choosing the last block.",
            "right" if right.all() else "wrong",
        )
        shape = tuple(states.shape[1:])
        nothing = np.zeros((shape[0], *shape)), np.zeros(shape[0]), np.zeros(shape), np.ones(shape)
        return Probe(*nothing, None, len(right))
    values = states.double().numpy()
    return _Rows(values, right).fit(_choose_strength(values, right))


def auroc_by_block(probe: Probe, readouts: BlockReadouts) -> list[float | None]:
    """Return for each block how well the probe separates its right readouts from its wrong ones.

    The area under the ROC curve: the probability that a right readout scores higher than a wrong one of the same block;
    0.5 is chance.

    Args:
        probe: fitted on other questions.
        readouts: readouts of the test split.

    Returns:
        K areas, None where a block's readouts are all right or all wrong.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    area = import_sklearn().metrics.roc_auc_score
    scores = probe.scores(readouts.states)
    return [
        float(area(right, scores[:, k])) if 0 < right.sum() < len(right) else None
        for k, right in enumerate(readouts.right.T)
    ]


def _choose_strength(states: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Return the inverse strength with the lowest log loss on held-out questions; ties take the strongest penalty."""
    order = np.random.default_rng(0).permutation(len(right))
    folds = []
    for held_out in np.array_split(order, min(NUM_FOLDS, len(order))):
        train = np.setdiff1d(order, held_out)
        # A part that is empty, all right or all wrong cannot be fitted.
        if 0 < right[train].sum() < right[train].size:
            folds.append((_Rows(states[train], right[train]), held_out))

    def loss(strength: float) -> float:
        total = 0.0
        for rows, held_out in folds:
            scores = rows.fit(strength).scores(torch.from_numpy(states[held_out]))
            # log(1 + exp(-margin)), without overflow
            total += float(np.logaddexp(0, -scores * np.where(right[held_out], 1, -1)).sum())
        return total

    return min(INVERSE_STRENGTHS, key=loss)


class _Rows:
    """Training questions, with everything that fits of different strengths share."""

    def __init__(self, states: NDArray[np.float64], right: NDArray[np.bool_]) -> None:
        self.right = right
        self.mean, deviation = states.mean(axis=0), states.std(axis=0)
        self.scale = np.where(deviation > 0, deviation, 1.0)
        self.features = ((states - self.mean) / self.scale).reshape(len(states), -1)
        self.axes: NDArray[np.float64] | None = None
        if len(states) < self.features.shape[1]:
            # An L2 penalty keeps the weights in the row space, which has fewer dimensions if K·H is large: solve the
            # same regression in the coordinates of that space.
            self.axes = np.linalg.svd(self.features, full_matrices=False)[2]
            self.features = self.features @ self.axes.T

    def fit(self, strength: float) -> Probe:
        """Return the probe of one inverse strength."""
        heads = [_fit_head(self.features, one, strength) for one in self.right.T]
        weight = np.stack([weight for weight, _ in heads])
        return Probe(
            weight=(weight if self.axes is None else weight @ self.axes).reshape(len(heads), *self.mean.shape),
            bias=np.array([bias for _, bias in heads]),
            mean=self.mean,
            scale=self.scale,
            inverse_strength=strength,
            num_training_rows=len(self.right),
        )


def _fit_head(
    features: NDArray[np.float64], right: NDArray[np.bool_], strength: float
) -> tuple[NDArray[np.float64], float]:
    if 0 < right.sum() < len(right):
        regression = import_sklearn().linear_model.LogisticRegression(C=strength, max_iter=5000)
        regression.fit(features, right)
        return regression.coef_[0], float(regression.intercept_[0])
    # All right or all wrong: nothing to learn from the states. The odds count half a case for the other side.
    return np.zeros(features.shape[1]), float(np.log((right.sum() + 0.5) / ((~right).sum() + 0.5)))


def import_sklearn() -> Any:
    """Import scikit-learn with the parts that the probe uses.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import sklearn.linear_model
        import sklearn.metrics
    except ImportError as error:
        raise ImportError("the probe needs scikit-learn: pip install 'rim-peft[compare]'") from error
    return sklearn
