"""A linear probe: from the state at a block's end, is the block's readout right?"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from rim_peft.evaluation.readouts import BlockReadouts

logger = logging.getLogger(__name__)

WEIGHTS_FILE, METADATA_FILE = "probe.safetensors", "probe.json"
_ARRAYS = ("weight", "block_bias", "mean", "scale")

INVERSE_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What cross-validation chooses from: scikit-learn's ``C``, the inverse of the L2 penalty's strength."""
NUM_FOLDS = 5
BLOCK_UNIT = 100.0
"""Value of a block's own feature, beside states of standard deviation 1."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Log-odds that a readout is right: ``weight · (state - mean) / scale + block_bias[k]``.

    One direction serves all blocks, since what is compared across blocks must be on one scale, and K probes would each
    have a K-th of the data; a bias for each block holds how often it is right.

    Attributes:
        weight: (H,) float64.
        block_bias: (K,) float64.
        mean: (H,) float64, mean state of the selection split's blocks.
        scale: (H,) float64, their standard deviation; 1 where it is 0.
        inverse_strength: chosen ``C``; None if every readout of the selection split was right, or every one wrong. Then
            the probe knows nothing: it scores all readouts alike, and choosing by it is choosing the last block.
        num_training_rows: questions of the selection split; each gave K readouts.
    """

    weight: NDArray[np.float64]
    block_bias: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    inverse_strength: float | None
    num_training_rows: int

    @property
    def num_blocks(self) -> int:
        """K, the blocks that the probe was fitted on."""
        return len(self.block_bias)

    def scores(self, states: Tensor) -> NDArray[np.float64]:
        """Return (N, K) log-odds that the readouts are right.

        Args:
            states: (N, K, H) last layer's states at the blocks' ends, block 1 first; K may be smaller than the probe's,
                since a block's state does not depend on later ones.

        Raises:
            ValueError: states of another width, or of more blocks than the probe has seen.
        """
        if states.ndim != 3 or states.shape[1] > self.num_blocks or states.shape[2] != len(self.weight):
            raise ValueError(
                f"states: must be (questions, at most {self.num_blocks} blocks, {len(self.weight)}) for this probe, "
                f"got {tuple(states.shape)}. Fit a probe on this adapter with as many blocks."
            )
        features = (states.double().numpy() - self.mean) / self.scale
        scores: NDArray[np.float64] = features @ self.weight + self.block_bias[: states.shape[1]]
        return scores

    def save(self, folder: str | Path) -> None:
        """Write ``probe.safetensors`` and ``probe.json`` into a folder, for instance an adapter's."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name) for name in _ARRAYS}, folder / WEIGHTS_FILE)
        metadata = {
            "format": 1,
            "kind": "logistic regression on the last layer's state at a block's end",
            "num_blocks": self.num_blocks,
            "hidden_size": len(self.weight),
            "inverse_strength": self.inverse_strength,
            "num_training_rows": self.num_training_rows,
        }
        (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Probe:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no probe.
        """
        weights, metadata = Path(folder) / WEIGHTS_FILE, Path(folder) / METADATA_FILE
        if not weights.is_file() or not metadata.is_file():
            raise FileNotFoundError(
                f"folder: {folder} must hold {WEIGHTS_FILE} and {METADATA_FILE}. Save a probe there."
            )
        known = json.loads(metadata.read_text(encoding="utf-8"))
        return cls(
            **load_file(weights),
            inverse_strength=known["inverse_strength"],
            num_training_rows=known["num_training_rows"],
        )


def fit_probe(selection: BlockReadouts) -> Probe:
    """Fit a probe on the selection split's readouts, never on those that it will choose from.

    Logistic regression with an L2 penalty, whose strength is the one with the least log loss in cross-validation. All
    readouts of a question lie in the same fold, since their states are nearly copies of each other.

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
        _, num_blocks, hidden_size = states.shape
        zeros = np.zeros(hidden_size)
        return Probe(zeros, np.zeros(num_blocks), zeros.copy(), np.ones(hidden_size), None, len(right))
    return _fit(states, right, strength=_choose_strength(states, right))


def auroc_by_block(probe: Probe, readouts: BlockReadouts) -> list[float | None]:
    """Return for each block how well the probe tells its right readouts from its wrong ones.

    The area under the ROC curve: the probability that a right readout scores higher than a wrong one of the same block;
    0.5 is chance.

    Args:
        probe: fitted on other questions.
        readouts: of the test split.

    Returns:
        K areas, None where a block is all right or all wrong.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    area = _import_sklearn().metrics.roc_auc_score
    scores = probe.scores(readouts.states)
    return [
        float(area(right, scores[:, k])) if 0 < right.sum() < len(right) else None
        for k, right in enumerate(readouts.right.T)
    ]


def _choose_strength(states: Tensor, right: NDArray[np.bool_]) -> float:
    """Return the inverse strength with the least log loss on held-out questions; of equals the strongest penalty."""
    order = np.random.default_rng(0).permutation(len(right))
    folds = [
        (np.setdiff1d(order, held_out), held_out) for held_out in np.array_split(order, min(NUM_FOLDS, len(order)))
    ]
    # A part that is all right or all wrong, or empty, cannot be fitted.
    folds = [(train, held_out) for train, held_out in folds if 0 < right[train].sum() < right[train].size]

    def loss(strength: float) -> float:
        total = 0.0
        for train, held_out in folds:
            scores = _fit(states[train], right[train], strength=strength).scores(states[held_out])
            # log(1 + exp(-margin)), without overflow
            total += float(np.logaddexp(0, -scores * np.where(right[held_out], 1, -1)).sum())
        return total

    return min(INVERSE_STRENGTHS, key=loss)


def _fit(states: Tensor, right: NDArray[np.bool_], *, strength: float) -> Probe:
    num_rows, num_blocks, hidden_size = states.shape
    flat = states.double().numpy().reshape(-1, hidden_size)
    mean, deviation = flat.mean(axis=0), flat.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    # How often a block is right is known well, and the penalty should not draw blocks together: in large units a bias
    # has a small weight, which it hardly reaches.
    block_numbers = np.tile(np.eye(num_blocks) * BLOCK_UNIT, (num_rows, 1))
    regression = _import_sklearn().linear_model.LogisticRegression(C=strength, max_iter=5000)
    regression.fit(np.hstack([(flat - mean) / scale, block_numbers]), right.reshape(-1))
    weight = regression.coef_[0]
    return Probe(
        weight=weight[:hidden_size].copy(),
        block_bias=weight[hidden_size:] * BLOCK_UNIT + regression.intercept_[0],
        mean=mean,
        scale=scale,
        inverse_strength=strength,
        num_training_rows=num_rows,
    )


def _import_sklearn() -> Any:
    try:
        import sklearn.linear_model
        import sklearn.metrics
    except ImportError as error:
        raise ImportError("the probe needs scikit-learn: pip install 'rim-peft[compare]'") from error
    return sklearn
