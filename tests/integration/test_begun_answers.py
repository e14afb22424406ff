"""Begun answers: `generate` and answerers lay out the row that training lays out, with the blocks before the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rim_peft.data.chats import Chat
from rim_peft.data.examples import Example, QuestionError
from rim_peft.data.tokenization import tokenize_example
from rim_peft.inference import BlockAnswerer, ThoughtAnswerer
from rim_peft.inference.swapping import MemoryAnswerer
from rim_peft.sequence import Sample, build_layout
from tests.conftest import EOS_ID, PAD_ID, build_rim, build_tokenizer

USER = {"role": "user", "content": "What is 1 + 1?"}
LONGER = [{"role": "system", "content": "Be brief."}, USER]
ANSWER = "It is 2"


def begun(messages: list[dict[str, str]], text: str) -> Chat:
    return Chat([*messages, {"role": "assistant", "content": text}], continue_final_message=True)


def answerer_of(model: Any, **options: Any) -> BlockAnswerer:
    return BlockAnswerer(model, build_tokenizer(), **{"max_new_tokens": 5, **options})


def inputs_of(model: Any, call: Any) -> list[dict[str, Any]]:
    """The inputs of every forward pass of the base during a call."""
    seen: list[dict[str, Any]] = []
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    try:
        call()
    finally:
        handle.remove()
    return seen


def follow_slowly(model: Any, row: list[int], length: int) -> list[int]:
    """Greedy tokens by plain forward passes over the whole row."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < length and EOS_ID not in answer:
            logits = model(input_ids=torch.tensor([[*row, *answer]])).logits
            answer.append(int(logits[0, -1].argmax()))
    return answer


def test_the_row_of_generate_is_that_of_training() -> None:
    model, tokenizer = build_rim(), build_tokenizer()
    blocks = model.peft_config["default"].block_tokens
    row = tokenize_example(Example(LONGER, ANSWER), tokenizer)
    trained = build_layout([Sample(row["prompt_ids"], [row["answer_ids"]] * 2)], blocks, pad_id=PAD_ID)
    is_seen = (trained.segment_ids[0] == 0) | (trained.segment_ids[0] == 2)  # by the last block's readout
    ids, positions = trained.input_ids[0, is_seen], trained.position_ids[0, is_seen]
    start = tokenizer("It is", add_special_tokens=False)["input_ids"]
    assert row["answer_ids"][: len(start)] == start
    length = len(row["prompt_ids"]) + 2 * blocks.length + len(start)
    prompt = torch.tensor([[*row["prompt_ids"], *start]])
    first, second = inputs_of(
        model,
        lambda: model.generate(prompt, num_begun=len(start), max_new_tokens=2, min_new_tokens=2, do_sample=False),
    )[:2]
    assert first["input_ids"][0].tolist() == ids[:length].tolist()
    assert first["position_ids"][0].tolist() == positions[:length].tolist()
    assert second["position_ids"][0].tolist() == positions[length : length + 1].tolist()
    (found,) = answerer_of(model).encode([begun(LONGER, "It is")])
    assert found == ids[:length].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mistral"])
def test_answers_continue_the_trained_row(architecture: str) -> None:
    model = build_rim(architecture)
    answerer = answerer_of(model)
    questions = [begun([USER], "It is"), [USER], begun(LONGER, "I"), LONGER, begun([USER], ANSWER)]
    prompts = answerer.encode(questions)
    blocks = answerer.decoder.blocks.ids(2)
    rows = [row if blocks[0] in row else [*row, *blocks] for row in prompts]
    expected = [follow_slowly(model, row, 5) for row in rows]
    assert answerer.decode(prompts) == expected
    assert answerer.generate(prompts) == expected
    assert list(answerer.answer(questions)) == [answerer.read(ids) for ids in expected]
    plain = [[token for token in row if token not in blocks] for row in prompts]
    assert len({tuple(row) for row in plain}) == len(plain)


def test_beams_and_samples_keep_their_rows() -> None:
    model, tokenizer = build_rim(), build_tokenizer(padding_side="left")
    texts, counts = ["<|user|>Hi<|assistant|>It is", "<|user|>Hi there<|assistant|>I"], [5, 1]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    together = model.generate(**batch, num_begun=counts, **options)
    for index, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt")
        single = model.generate(**alone, num_begun=counts[index], **options)
        found = together[2 * index : 2 * index + 2, batch["input_ids"].shape[1] :]
        assert found.tolist() == single[:, alone["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("options", [{"insertion_layer": 1}, {"bidirectional_blocks": True}])
def test_with_variants_of_blocks(options: dict[str, Any]) -> None:
    model = build_rim(**options)
    answerer = answerer_of(model)
    prompts = answerer.encode([begun([USER], "It is"), LONGER])
    alone = [answerer.decode([prompt])[0] for prompt in prompts]
    assert answerer.decode(prompts) == answerer.generate(prompts) == alone


def test_several_adapters_in_one_batch() -> None:
    model = build_rim()
    prompt = torch.tensor([[70, 71, 72, 73, 74]] * 2)
    names = ["default", "__base__"]
    mixed = model.generate(prompt, adapter_names=names, num_begun=2, max_new_tokens=4, do_sample=False)
    alone = model.generate(prompt[:1], num_begun=2, max_new_tokens=4, do_sample=False)
    with model.disable_adapter():
        base = model.generate(prompt[:1], num_begun=2, max_new_tokens=4, do_sample=False)
    assert mixed.tolist() == [alone[0].tolist(), base[0].tolist()]
    assert alone.tolist() != model.generate(prompt[:1], max_new_tokens=4, do_sample=False).tolist()


def test_without_blocks_a_begun_answer_is_the_prompts_end() -> None:
    answerer = answerer_of(build_rim(num_blocks=0))
    question = begun([USER], "It is")
    (prompt,) = answerer.encode([question])
    assert answerer.tokenizer.decode(prompt).endswith("<|assistant|>It is")
    assert answerer.decode([prompt]) == answerer.generate([prompt])


def test_any_memory_may_come_before_it() -> None:
    model = build_rim()
    ids = model.peft_config["default"].block_tokens.ids(2)
    plain, other = answerer_of(model), MemoryAnswerer(model, build_tokenizer(), ids, max_new_tokens=5)
    questions = [begun([USER], "It is"), LONGER]
    assert list(other.answer(questions)) == list(plain.answer(questions))


def test_a_conversation_can_go_on_after_a_begun_answer() -> None:
    """The decoder streams it too: what is kept is the prompt before the blocks."""
    answerer = answerer_of(build_rim())
    conversation = answerer.conversation()
    (prompt,) = answerer.encode([begun([USER], "It is")])
    assert [list(answerer.stream(prompt, conversation._kept))] == answerer.decode([prompt])
    (plain,) = answerer.encode([[USER]])
    assert conversation._kept.ids == plain
    assert [list(answerer.stream(plain, conversation._kept))] == answerer.decode([plain])
    assert conversation.num_kept == len(plain)


@pytest.mark.parametrize("num_begun", [5, -1, [1], [1, 5], 2.0, True, [True, 1]])
def test_numbers_out_of_range_are_refused(num_begun: Any) -> None:
    with pytest.raises(
        ValueError, match=r"num_begun: must be an integer for all rows or one for each, from 0 to below"
    ):
        build_rim().generate(torch.full((2, 5), 70), num_begun=num_begun, max_new_tokens=1)


def test_what_does_not_go_with_a_begun_answer() -> None:
    model = build_rim()
    ids = model.peft_config["default"].block_tokens.ids(2)
    prompt = torch.tensor([[70, 71, 72, 73]])
    with pytest.raises(ValueError, match="num_begun: must be 0 for input_ids that end in memory ids, got 1"):
        model.generate(torch.tensor([[70, 71, *ids]]), num_begun=1, max_new_tokens=1)
    with pytest.raises(ValueError, match="position_ids: must be omitted with num_begun"):
        model.generate(prompt, num_begun=1, position_ids=torch.arange(4)[None], max_new_tokens=1)
    masked = torch.tensor([[0, 0, 0, 1]])
    with pytest.raises(ValueError, match=r"num_begun: must be .*, from 0 to below the tokens of a row, \[1\], got 1"):
        model.generate(prompt, num_begun=1, attention_mask=masked, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompts: must not hold blocks where every block is read out"):
        answerer_of(model).read_blocks([begun([USER], "It is")])
    thinking = ThoughtAnswerer(build_rim(num_blocks=0), build_tokenizer(), num_thoughts=2)
    problem = r"questions\[1\]: must end with the user's message where continuous thoughts follow"
    with pytest.raises(QuestionError, match=problem) as caught:
        list(thinking.answer([[USER], begun([USER], "It is")]))
    assert caught.value.index == 1


def test_room_is_that_of_the_whole_row() -> None:
    answerer = answerer_of(build_rim())
    (prompt,) = answerer.encode([begun([USER], "It is")])
    answerer.model.config.max_position_embeddings = len(prompt) + 5
    assert answerer.decode(answerer.encode([begun([USER], "It is")]))
    answerer.model.config.max_position_embeddings -= 1
    with pytest.raises(ValueError, match="must fit into the base's"):
        answerer.encode([begun([USER], "It is")])
