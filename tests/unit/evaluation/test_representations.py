"""Blocks' states in two dimensions, on points whose components are plain to see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rim_peft.evaluation.readouts import block_components, training_components

CENTRE = torch.tensor([5.0, -3.0, 2.0])


def readouts(states: Tensor) -> Any:
    num_questions, num_blocks = states.shape[:2]
    right = np.arange(num_questions * num_blocks).reshape(num_questions, num_blocks) % 3 == 0
    return SimpleNamespace(states=states, right=right, lengths=[None, *range(2, num_questions + 1)])


def test_components_of_a_cross() -> None:
    # Spread 3 along the third axis and 1 along the first: 2 · 9 and 2 · 1 of 20 in squares.
    states = CENTRE + torch.tensor([[[0.0, 0, 3], [0, 0, -3]], [[1.0, 0, 0], [-1, 0, 0]]])
    found = block_components(readouts(states))
    assert found == {
        "explained_variance": [0.9, 0.1],
        "points": [
            {"block": 1, "length": None, "right": True, "x": 3.0, "y": 0.0},
            {"block": 2, "length": None, "right": False, "x": -3.0, "y": 0.0},
            {"block": 1, "length": 2, "right": False, "x": 0.0, "y": 1.0},
            {"block": 2, "length": 2, "right": True, "x": 0.0, "y": -1.0},
        ],
    }


def test_the_sign_does_not_depend_on_the_order() -> None:
    states = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    points = [(point["x"], point["y"]) for point in block_components(readouts(states))["points"]]
    turned = [(point["x"], point["y"]) for point in block_components(readouts(states.flip(0, 1)))["points"]]
    torch.testing.assert_close(torch.tensor(points), torch.tensor(turned[::-1]), atol=2e-6, rtol=0)


def test_few_points_are_shown_and_all_states_fitted() -> None:
    states = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(0))
    everything, some = block_components(readouts(states)), block_components(readouts(states), max_points=8)
    assert some["explained_variance"] == everything["explained_variance"]
    # 8 points are 2 questions of 3 blocks: the first, and the one in the middle.
    assert some["points"] == everything["points"][:3] + everything["points"][15:18]


@pytest.mark.parametrize(
    ("states", "shares"),
    [
        (torch.ones(1, 1, 4), [0.0, 0.0]),
        (torch.tensor([[[1.0]], [[3.0]]]), [1.0, 0.0]),
        (torch.tensor([[[1.0, 2.0], [3.0, 6.0]]], dtype=torch.bfloat16), [1.0, 0.0]),
    ],
)
def test_states_without_two_directions(states: Tensor, shares: list[float]) -> None:
    found = block_components(readouts(states))
    assert found["explained_variance"] == shares
    assert all(point["y"] == 0.0 for point in found["points"])


def test_checkpoints_share_one_projection() -> None:
    early = torch.tensor([[[0.0, 4, 0], [0, -4, 0]], [[0.0, 4, 0], [0, -4, 0]]])
    late = torch.tensor([[[1.0, 0, 0], [-1, 0, 0]], [[3.0, 0, 0], [-3, 0, 0]]])
    found = training_components([("grounding", 10, CENTRE + early), ("refinement", 20, CENTRE + late)])
    # Squares: 4 · 16 along y, 2 · 1 + 2 · 9 along x.
    assert found["explained_variance"] == [round(64 / 84, 6), round(20 / 84, 6)]
    assert found["points"] == [
        {"step": 10, "stage": "grounding", "block": 1, "x": 4.0, "y": 0.0},
        {"step": 10, "stage": "grounding", "block": 2, "x": -4.0, "y": 0.0},
        {"step": 20, "stage": "refinement", "block": 1, "x": 0.0, "y": 2.0},
        {"step": 20, "stage": "refinement", "block": 2, "x": 0.0, "y": -2.0},
    ]


def test_states_that_cannot_be_projected_are_named() -> None:
    states = torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match=r"states: must be \(N, K, H\), .* got shapes \[\]"):
        training_components([])
    with pytest.raises(ValueError, match=r"got shapes \[\(2, 2, 3\), \(2, 2, 4\)\]"):
        training_components([("a", 1, states), ("a", 2, torch.zeros(2, 2, 4))])
    with pytest.raises(ValueError, match=r"got shapes \[\(0, 2, 3\)\]"):
        block_components(readouts(states[:0]))
    with pytest.raises(ValueError, match="states: must be finite"):
        block_components(readouts(states / 0))
    with pytest.raises(ValueError, match="max_points: must be an integer of at least 2, got 1"):
        block_components(readouts(states), max_points=1)
