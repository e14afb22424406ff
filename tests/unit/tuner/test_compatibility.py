"""How many positions a base has, read from its config."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig, Gemma3TextConfig, LlamaConfig, Phi3Config

from rim_peft.tuner.bases import num_positions

_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (Gemma3TextConfig(max_position_embeddings=64), 64),  # its rotations differ by layer type
        (BloomConfig(), None),
        (Phi3Config(max_position_embeddings=64, original_max_position_embeddings=32, rope_parameters=_LONGROPE), 32),
        (Phi3Config(max_position_embeddings=64, original_max_position_embeddings=32), 64),
    ],
)
def test_positions_are_those_up_to_which_rows_do_not_change_each_other(config: Any, expected: int | None) -> None:
    assert num_positions(config) == expected
