"""Batches whose rows have different adapters, against a batch for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rim_peft import RiMConfig
from tests.conftest import ARCHITECTURES, PAD_ID, VOCAB_SIZE, MakeRim, randomize_lora

NAMES = ["long", "__base__", "default", "memory", "long"]
QUESTIONS = ["What is one and two?", "Who is she?", "Why?", "Where, and when?", "Who?"]
NO_EOS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": PAD_ID}


@pytest.fixture
def make_mixed(make_rim: MakeRim) -> MakeRim:
    """A model with three adapters that differ in blocks and in LoRA."""

    def make(architecture: str = "llama", **options: Any) -> Any:
        model = make_rim(architecture, **options)
        model.add_adapter("long", RiMConfig(num_blocks=3, block_size=3, r=2, **options))
        model.add_adapter("memory", RiMConfig(num_blocks=1, block_size=1, r=0))
        randomize_lora(model)
        return model.eval()

    return make


def generate(model: Any, inputs: Any, **options: Any) -> Tensor:
    """Answers (B, T) to padded prompts."""
    output: Tensor = model.generate(**inputs, **{"max_new_tokens": 6, **NO_EOS, **options})
    return output[:, inputs.input_ids.shape[1] :]


def generate_alone(model: Any, tokenizer: Any, question: str, name: str, **options: Any) -> Tensor:
    inputs = tokenizer([question], return_tensors="pt", padding=True)
    if name == "__base__":
        with model.disable_adapter():
            return generate(model, inputs, **options)
    model.set_adapter(name)
    return generate(model.eval(), inputs, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"repetition_penalty": 1.7},
    ],
    ids=str,
)
def test_each_row_gets_the_answer_of_its_own_adapter(
    make_mixed: MakeRim, tokenizer: Any, architecture: str, options: dict[str, Any]
) -> None:
    model = make_mixed(architecture)
    inputs = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    mixed = generate(model, inputs, adapter_names=NAMES, **options)
    expected = [
        generate_alone(model, tokenizer, question, name, **options)
        for question, name in zip(QUESTIONS, NAMES, strict=True)
    ]
    torch.testing.assert_close(mixed, torch.cat(expected))
    model.set_adapter("default")
    assert not torch.equal(generate(model.eval(), inputs, **options), mixed)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "variant",
    [{"insertion_layer": 1}, {"bidirectional_blocks": True}, {"insertion_layer": 1, "bidirectional_blocks": True}],
)
def test_adapters_with_other_insertion_layers_and_bidirectional_blocks(
    make_mixed: MakeRim, tokenizer: Any, architecture: str, variant: dict[str, Any]
) -> None:
    """The adapter ``memory`` has neither: its rows are as causal as those of the base."""
    model = make_mixed(architecture, **variant)
    inputs = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    mixed = generate(model, inputs, adapter_names=NAMES)
    for answer, question, name in zip(mixed, QUESTIONS, NAMES, strict=True):
        torch.testing.assert_close(answer, generate_alone(model, tokenizer, question, name)[0])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("variant", [{}, {"insertion_layer": 1, "bidirectional_blocks": True}])
def test_a_forward_pass_equals_separate_ones(make_mixed: MakeRim, architecture: str, variant: dict[str, Any]) -> None:
    model = make_mixed(architecture, **variant)
    first = VOCAB_SIZE
    ids = torch.tensor(
        [
            [20, 30, first, first + 1, first + 1, first + 2, 60],
            [20, 30, 40, 50, 60, 70, 80],
            [20, 30, first, first + 1, first + 2, 50, 60],
            [PAD_ID, 30, first, first + 1, first + 2, 50, 60],
        ]
    )
    mask = (ids != PAD_ID).long()
    names = ["long", "__base__", "default", "memory"]
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for row, name in enumerate(names):
            one = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(**one).logits
            else:
                model.set_adapter(name)
                expected = model.eval()(**one).logits
            kept = mask[row].bool()
            torch.testing.assert_close(mixed[row, kept], expected[0, kept], atol=1e-5, rtol=1e-4)


def test_a_call_leaves_nothing_behind_also_when_it_fails(make_mixed: MakeRim) -> None:
    model = make_mixed()
    ids = torch.tensor([[20, 30], [40, 50]])
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    expected = model.generate(ids, max_new_tokens=3)
    model.generate(ids, max_new_tokens=3, adapter_names=["long", "memory"])
    with pytest.raises(ValueError, match="adapter_names: must name an adapter for each of the batch's 2 rows, got 1"):
        model(input_ids=ids, adapter_names=["long"])
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    torch.testing.assert_close(model.generate(ids, max_new_tokens=3), expected)


def test_num_blocks_of_a_call_holds_for_all_rows_with_an_adapter(make_mixed: MakeRim, tokenizer: Any) -> None:
    model = make_mixed()
    inputs = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    mixed = generate(model, inputs, adapter_names=NAMES, num_blocks=2)
    assert not torch.equal(mixed, generate(model, inputs, adapter_names=NAMES))
    for answer, question, name in zip(mixed, QUESTIONS, NAMES, strict=True):
        options = {} if name == "__base__" else {"num_blocks": 2}
        torch.testing.assert_close(answer, generate_alone(model, tokenizer, question, name, **options)[0])


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}], ids=str)
def test_token_types_go_with_their_tokens(make_mixed: MakeRim, tokenizer: Any, options: dict[str, Any]) -> None:
    model = make_mixed("gpt2")
    inputs = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    inputs["token_type_ids"] = inputs.input_ids % 7 + 1
    mixed = generate(model, inputs, adapter_names=NAMES, **options)
    for row, (question, name) in enumerate(zip(QUESTIONS, NAMES, strict=True)):
        alone = tokenizer([question], return_tensors="pt").input_ids
        expected = generate_alone(model, tokenizer, question, name, token_type_ids=alone % 7 + 1)
        torch.testing.assert_close(mixed[row : row + 1], expected)


def test_a_batch_of_base_rows_alone_is_the_bases(make_mixed: MakeRim, tokenizer: Any) -> None:
    model = make_mixed()
    inputs = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    with model.disable_adapter():
        expected = generate(model, inputs)
    torch.testing.assert_close(generate(model, inputs, adapter_names=["__base__"] * len(QUESTIONS)), expected)


def test_one_row_may_have_no_adapter(make_mixed: MakeRim) -> None:
    model = make_mixed()
    ids = torch.tensor([[20, 30, 40]])
    with model.disable_adapter(), torch.no_grad():
        expected = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, adapter_names=["__base__"]).logits, expected)


def test_what_cannot_be_mixed_is_refused(make_mixed: MakeRim) -> None:
    model = make_mixed()
    ids = torch.tensor([[20, 30], [40, 50]])
    held = torch.tensor([[20, VOCAB_SIZE, VOCAB_SIZE + 1], [30, VOCAB_SIZE, VOCAB_SIZE + 1]])
    with pytest.raises(ValueError, match=r"adapter_names: must be a list with one of \['default', 'long', 'memory', "):
        model(input_ids=ids, adapter_names=["default", "typo"])
    with pytest.raises(ValueError, match=r"adapter_names: must be a list .* got 'default'"):
        model(input_ids=ids, adapter_names="default")
    with pytest.raises(ValueError, match="adapter_names: must name an adapter for each of the batch's 2 rows, got 3"):
        model.generate(ids, adapter_names=["default", "long", "long"], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"adapter_names: prompts are moved .* got input_ids with memory ids"):
        model.generate(held, adapter_names=["default", "long"], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"adapter_names: prompts are moved .* got position_ids"):
        model.generate(ids, position_ids=torch.arange(2)[None], adapter_names=["default", "long"], max_new_tokens=2)
    with pytest.raises(ValueError, match="or in rows of '__base__'"):
        model(input_ids=held, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="adapter_names: must be omitted in training mode"):
        model.train()(input_ids=ids, adapter_names=["default", "long"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):  # PEFT's own
        model(input_ids=ids, adapter_names=["default", "long"])


def test_dora_is_refused_as_for_lora(make_rim: MakeRim) -> None:
    model: nn.Module = make_rim(use_dora=True)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):  # PEFT's own
        model(input_ids=torch.tensor([[20, 30]]), adapter_names=["default"])
