"""Readouts of all blocks at once, against what `generate` says after each number of blocks."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from rim_peft.data.examples import Templates
from rim_peft.inference import answer_questions, read_blocks
from tests.conftest import ARCHITECTURES, build_base, build_rim

QUESTIONS = ["2+3", "what is 17 times 4?", "x"]
TEMPLATES = Templates(prompt="Q {question} A")


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    return tokenizer(f"Q {question} A")["input_ids"]


def _generate_alone(model: PeftModel, prompt: list[int], num_blocks: int, *, length: int) -> list[int]:
    """One prompt, one number of blocks, through `generate`."""
    output = model.generate(
        input_ids=torch.tensor([prompt]), num_blocks=num_blocks, max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_blocks_readout_is_what_generate_says_after_it(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_rim(architecture, num_blocks=3)
    found = read_blocks(model, tokenizer, QUESTIONS, templates=TEMPLATES, max_new_tokens=5)
    assert [len(row) for row in found] == [3, 3, 3]
    for question, row in zip(QUESTIONS, found, strict=True):
        for k, readout in enumerate(row, start=1):
            expected = _generate_alone(model, _prompt_ids(tokenizer, question), k, length=5)
            assert readout.block == k
            assert readout.token_ids == expected, (question, k)
            assert readout.text == tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_log_probabilities_and_states_are_those_of_a_plain_forward(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_rim(architecture, num_blocks=2)
    blocks = model.peft_config["default"].block_tokens
    found = read_blocks(model, tokenizer, QUESTIONS, templates=TEMPLATES, max_new_tokens=3)
    for question, row in zip(QUESTIONS, found, strict=True):
        for k, readout in enumerate(row, start=1):
            trunk = [*_prompt_ids(tokenizer, question), *blocks.ids(k)]
            with torch.no_grad():
                output = model(input_ids=torch.tensor([[*trunk, *readout.token_ids]]), output_hidden_states=True)
            log_probs = output.logits[0, len(trunk) - 1 : -1].log_softmax(-1)
            expected = log_probs[range(len(readout.token_ids)), readout.token_ids]
            torch.testing.assert_close(torch.tensor(readout.token_log_probs), expected, atol=1e-4, rtol=1e-4)
            state = output.hidden_states[-1][0, len(trunk) - 1]
            torch.testing.assert_close(readout.hidden_state, state, atol=1e-5, rtol=1e-4)


def test_readouts_stop_at_eos_each_on_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=4)
    free = read_blocks(model, tokenizer, QUESTIONS, max_new_tokens=6)
    # Declare a token that some readouts hold in their middle to be the end.
    common = [readout.token_ids[2] for row in free for readout in row]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(max(set(common), key=common.count))
    found = read_blocks(model, tokenizer, QUESTIONS, max_new_tokens=6)
    end = tokenizer.eos_token_id
    lengths = set()
    for free_row, row in zip(free, found, strict=True):
        for before, after in zip(free_row, row, strict=True):
            expected = before.token_ids
            expected = expected[: expected.index(end) + 1] if end in expected else expected
            assert after.token_ids == expected
            assert len(after.token_log_probs) == len(expected)
            lengths.add(len(expected))
    assert len(lengths) > 1


@pytest.mark.parametrize("num_blocks", [None, 0, 1, 5])
def test_answers_do_not_depend_on_the_batch(num_blocks: int | None, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=2)
    together = list(
        answer_questions(model, tokenizer, QUESTIONS, num_blocks=num_blocks, max_new_tokens=5, batch_size=3)
    )
    alone = list(answer_questions(model, tokenizer, QUESTIONS, num_blocks=num_blocks, max_new_tokens=5, batch_size=1))
    assert together == alone
    assert len(set(together)) > 1


def test_the_final_readout_is_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=3)
    answers = list(answer_questions(model, tokenizer, QUESTIONS, max_new_tokens=5))
    blocks = read_blocks(model, tokenizer, QUESTIONS, max_new_tokens=5)
    assert [row[-1].text for row in blocks] == answers


def test_chat_questions_are_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=2)
    chat = [{"role": "user", "content": "2+3"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    (row,) = read_blocks(model, tokenizer, [chat], max_new_tokens=4)
    assert row[1].token_ids == _generate_alone(model, ids, 2, length=4)


def test_settings_that_the_base_came_with_do_not_change_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=3)
    expected = list(answer_questions(model, tokenizer, QUESTIONS, max_new_tokens=6))
    model.get_base_model().generation_config.repetition_penalty = 1.7
    model.get_base_model().generation_config.num_beams = 3
    assert list(answer_questions(model, tokenizer, QUESTIONS, max_new_tokens=6)) == expected


def test_questions_without_room_for_an_answer_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(base=build_base("gpt2", n_positions=64), num_blocks=3)
    questions = ["short", "x" * 50]
    message = r"questions\[1\]: prompt \(51 tokens\), blocks \(12\) and answer \(5\) must fit into the base's 64"
    with pytest.raises(ValueError, match=message):
        read_blocks(model, tokenizer, questions, max_new_tokens=5)
    with pytest.raises(ValueError, match=message):
        list(answer_questions(model, tokenizer, questions, max_new_tokens=5))


def test_bad_calls_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="num_blocks: reading blocks out needs at least one, got 0"):
        read_blocks(build_rim(), tokenizer, QUESTIONS, num_blocks=0)
    with pytest.raises(ValueError, match="active adapter is RIM, got LlamaForCausalLM"):
        list(answer_questions(build_base(), tokenizer, QUESTIONS))
    with pytest.raises(ValueError, match="active adapter is RIM, got LlamaForCausalLM"):
        read_blocks(build_base(), tokenizer, QUESTIONS)
    with pytest.raises(ValueError, match="batch_size: must be an integer of at least 1, got 0"):
        list(answer_questions(build_rim(), tokenizer, QUESTIONS, batch_size=0))
    with pytest.raises(ValueError, match="num_blocks: must be an integer of at least 0, got '3'"):
        read_blocks(build_rim(), tokenizer, QUESTIONS, num_blocks="3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens: must be an integer of at least 1, got 0"):
        read_blocks(build_rim(), tokenizer, QUESTIONS, max_new_tokens=0)
