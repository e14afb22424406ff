"""Greedy search through `generate`, on bases that came with settings of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rim_peft.inference.greedy import generate_greedily
from tests.conftest import EOS_ID, PAD_ID, build_base, build_rim

PROMPTS = [[7, 8, 9, 10], [11]]


def _generate(model: Any, *, eos_id: int | None = None, **options: Any) -> list[list[int]]:
    return generate_greedily(model, PROMPTS, eos_id=eos_id, pad_id=PAD_ID, max_new_tokens=5, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_repetition_penalty", 3.0),
        ("exponential_decay_length_penalty", (1, 5.0)),
        ("forced_eos_token_id", 9),
        ("guidance_scale", 3.0),
        ("max_time", 1e-9),
        ("num_beams", 3),
        ("num_return_sequences", 2),
        ("prompt_lookup_num_tokens", 2),
        ("repetition_penalty", 1.9),
        ("return_dict_in_generate", True),
        ("stop_strings", ["a"]),
        ("suppress_tokens", list(range(6, 200))),
    ],
)
def test_settings_that_the_base_came_with_change_nothing(name: str, value: Any) -> None:
    model = build_rim(num_blocks=2)
    expected = _generate(model)
    settings = model.get_base_model().generation_config
    setattr(settings, name, value)
    assert _generate(model) == expected
    assert model.get_base_model().generation_config is settings
    assert getattr(settings, name) == value


def test_rows_are_those_of_generate_each_cut_behind_its_eos() -> None:
    base = build_base()
    free = _generate(base)
    for prompt, answer in zip(PROMPTS, free, strict=True):
        output = base.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert output[0, len(prompt) :].tolist() == answer
    end = free[0][2]
    assert end not in free[0][:2] + free[1]
    assert _generate(base, eos_id=end) == [free[0][:3], free[1]]
    assert _generate(base, eos_id=EOS_ID) == free


def test_settings_come_back_after_an_error() -> None:
    base = build_base()
    settings = base.generation_config
    with pytest.raises(ValueError, match="num_blocks"):
        _generate(base, num_blocks=1)  # it has no adapter
    assert base.generation_config is settings
