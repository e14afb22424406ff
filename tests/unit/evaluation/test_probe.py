"""The probe on states whose secret is known."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rim_peft.evaluation.probe import INVERSE_STRENGTHS, Probe, auroc_by_block, fit_probe
from rim_peft.evaluation.readouts import BlockReadouts
from rim_peft.inference.readout import select_by_score
from tests.unit.evaluation.test_readouts import readouts_of as build_readouts

HIDDEN = 6


def _draw(seed: int, *, num_rows: int = 120, num_blocks: int = 3, noise: float = 0.0) -> BlockReadouts:
    """A readout is right where its state's first entry is above 5; later entries, of other sizes, say nothing."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(num_rows, num_blocks, HIDDEN)) * [1, 1, 10, 0.1, 1, 0] + 5
    right = states[:, :, 0] + noise * rng.normal(size=(num_rows, num_blocks)) > 5
    return build_readouts(right, states=torch.tensor(states, dtype=torch.float32))


def test_it_learns_what_separates_right_from_wrong() -> None:
    probe, test = fit_probe(_draw(0, num_rows=400)), _draw(1)
    assert probe.num_training_rows == 400
    assert probe.inverse_strength == INVERSE_STRENGTHS[-1]  # nothing but signal: the weakest penalty
    assert [np.unravel_index(np.abs(head).argmax(), head.shape) for head in probe.weight] == [(0, 0), (1, 0), (2, 0)]
    agree = (probe.scores(test.states) > 0) == test.right
    assert agree.mean() > 0.95
    assert all(area is not None and area > 0.99 for area in auroc_by_block(probe, test))


def test_pure_noise_gets_the_strongest_penalties() -> None:
    probe = fit_probe(_draw(0, noise=1000.0))
    assert probe.inverse_strength is not None
    assert probe.inverse_strength <= 1e-3
    areas = auroc_by_block(probe, _draw(1, noise=1000.0))
    assert all(area is not None and 0.3 < area < 0.7 for area in areas)


def test_what_another_block_says_counts() -> None:
    # The last block's state tells how long the chain is, and so which of the blocks is right; the others' say nothing.
    rng = np.random.default_rng(0)

    def draw(num_rows: int) -> BlockReadouts:
        length = rng.integers(3, size=num_rows)
        states = rng.normal(size=(num_rows, 3, HIDDEN))
        states[:, 2, 4] = np.where(length == 0, 3.0, -3.0)
        states[:, 2, 2] = np.where(length == 1, 3.0, -3.0)
        return build_readouts(np.eye(3)[length], states=torch.tensor(states, dtype=torch.float32))

    probe, test = fit_probe(draw(300)), draw(200)
    chosen = select_by_score(probe.scores(test.states))
    assert test.chosen(chosen)["all"].accuracy > 0.97
    assert test.right[:, 2].mean() < 0.45


def test_a_heads_bias_is_how_often_its_block_is_right() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((400, 3)) < [0.1, 0.5, 1.1]  # the last block is always right
    probe = fit_probe(build_readouts(right, states=torch.tensor(rng.normal(size=(400, 3, 2)), dtype=torch.float32)))
    shares = right[:, :2].mean(axis=0)
    np.testing.assert_allclose(probe.bias[:2], np.log(shares / (1 - shares)), atol=0.35)
    assert probe.bias[2] == np.log(400.5 / 0.5)
    assert not probe.weight[2].any()


@pytest.mark.parametrize("num_rows", [120, 12])  # more rows than features, and fewer
def test_scores_are_scikit_learns_decision_function(num_rows: int) -> None:
    selection, test = _draw(0, num_rows=num_rows, noise=0.5), _draw(1)
    probe = fit_probe(selection)
    values = selection.states.double().numpy()
    np.testing.assert_allclose(probe.mean, values.mean(axis=0))
    assert (probe.scale[:, -1] == 1.0).all()  # an entry that never changes

    def features(readouts: BlockReadouts) -> np.ndarray:
        return ((readouts.states.double().numpy() - probe.mean) / probe.scale).reshape(-1, 3 * HIDDEN)

    for k in range(3):
        theirs = LogisticRegression(C=probe.inverse_strength, max_iter=5000, tol=1e-10)
        theirs.fit(features(selection), selection.right[:, k])
        expected = theirs.decision_function(features(test))
        np.testing.assert_allclose(probe.scores(test.states)[:, k], expected, atol=0.01)


def test_areas_by_hand_and_none_where_there_is_nothing_to_tell_apart() -> None:
    probe = Probe(np.eye(3)[..., None], np.zeros(3), np.zeros((3, 1)), np.ones((3, 1)), 1.0, 1)
    states = torch.tensor([[[4.0], [1.0], [1.0]], [[3.0], [1.0], [1.0]], [[2.0], [1.0], [1.0]], [[1.0], [1.0], [1.0]]])
    right = [[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]]
    # Block 1: of the four pairs (right, wrong) three are in order: 4 > 3, 4 > 1, 2 > 1, but 2 < 3.
    assert auroc_by_block(probe, build_readouts(right, states=states)) == [0.75, None, None]


@pytest.mark.parametrize("verdict", [True, False])
def test_a_probe_that_could_learn_nothing_chooses_the_last_block(
    verdict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    states = torch.randn(5, 3, HIDDEN)
    with caplog.at_level(logging.WARNING):
        probe = fit_probe(build_readouts(np.full((5, 3), verdict), states=states))
    assert f"is {'right' if verdict else 'wrong'}, so there is nothing to learn" in caplog.text
    assert probe.inverse_strength is None
    assert select_by_score(probe.scores(_draw(1).states)).tolist() == [2] * 120


def test_one_question_has_no_folds_and_gets_the_strongest_penalty() -> None:
    probe = fit_probe(build_readouts([[1, 0]], states=torch.tensor([[[1.0], [2.0]]])))
    assert probe.inverse_strength == INVERSE_STRENGTHS[0]
    assert probe.scores(torch.tensor([[[1.0], [2.0]]]))[0].argmax() == 0


def test_a_saved_probe_scores_the_same_to_the_last_bit(tmp_path: Path) -> None:
    probe, states = fit_probe(_draw(0)), _draw(1).states
    probe.save(tmp_path / "adapter")
    again = Probe.load(tmp_path / "adapter")
    np.testing.assert_array_equal(again.scores(states), probe.scores(states))
    assert (again.inverse_strength, again.num_training_rows) == (probe.inverse_strength, 120)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["probe.json", "probe.safetensors"]
    metadata = json.loads((tmp_path / "adapter" / "probe.json").read_text())
    assert (metadata["num_blocks"], metadata["hidden_size"]) == (3, HIDDEN)


def test_the_same_readouts_give_the_same_probe() -> None:
    np.testing.assert_array_equal(fit_probe(_draw(0, noise=1.0)).weight, fit_probe(_draw(0, noise=1.0)).weight)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = fit_probe(_draw(0))
    with pytest.raises(ValueError, match=r"states: must be \(questions, 3, 6\).* got \(2, 4, 6\)"):
        probe.scores(torch.zeros(2, 4, HIDDEN))
    with pytest.raises(ValueError, match=r"got \(2, 2, 6\)"):
        probe.scores(torch.zeros(2, 2, HIDDEN))
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\)"):
        probe.scores(torch.zeros(2, 3, 5))
    probe.save(tmp_path / "old")
    metadata = tmp_path / "old" / "probe.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "format": 1}))
    with pytest.raises(ValueError, match="must have format 2, got 1"):
        Probe.load(tmp_path / "old")
    with pytest.raises(FileNotFoundError, match=r"must hold probe\.safetensors and probe\.json"):
        Probe.load(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'rim-peft\[compare\]'"):
        fit_probe(_draw(0))
