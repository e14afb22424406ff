from typing import Any

import torch
from transformers import LlamaConfig

from rim_peft.tuner.insertion import BlockInsertion


class Base:
    """Stands in for a base: gives back the inputs that it is asked to prepare."""

    config = LlamaConfig(max_position_embeddings=20)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, **kwargs}


def test_prompt_and_answer_are_translated() -> None:
    base = Base()
    insertion = BlockInsertion(base, prompt_length=3, block_ids=[90, 91, 92])
    attached = insertion.attached_to(base)
    first = attached.prepare_inputs_for_generation(
        torch.tensor([[0, 5, 6], [7, 8, 9]]),
        next_sequence_length=3,
        is_first_iteration=True,
        attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 1], [0, 1, 2]]),
    )
    second = attached.prepare_inputs_for_generation(
        torch.tensor([[0, 5, 6, 11, 13], [7, 8, 9, 12, 14]]),
        next_sequence_length=1,
        attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    )
    assert first["input_ids"].tolist() == [[0, 5, 6, 90, 91, 92], [7, 8, 9, 90, 91, 92]]
    assert first["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert first["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert first["next_sequence_length"] == 6
    assert second["input_ids"].tolist() == [[0, 5, 6, 90, 91, 92, 11, 13], [7, 8, 9, 90, 91, 92, 12, 14]]
    assert second["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]
    assert second["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert second["next_sequence_length"] == 1
    assert vars(base) == {}


def test_sequences_get_the_callers_memory_back() -> None:
    insertion = BlockInsertion(Base(), prompt_length=2, block_ids=[90, 91])
    assert insertion.put_back(torch.tensor([[5, 6, 7], [8, 9, 10]])).tolist() == [[5, 6, 90, 91, 7], [8, 9, 90, 91, 10]]
