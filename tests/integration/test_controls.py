"""Controls on the blocks, against full forward passes in which projections' outputs are replaced by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rim_peft.data.examples import Example, Question, Templates
from rim_peft.evaluation import controls
from rim_peft.evaluation.controls import Control, run_controls, shuffle_ids
from rim_peft.inference import answer_questions
from rim_peft.inference.swapping import (
    MemoryAnswerer,
    SwappingDecoder,
    answer_with_memory_ids,
    answer_with_swapped_blocks,
    random_rows,
)
from rim_peft.tasks import Task
from rim_peft.tuner.config import active_config
from tests.conftest import ARCHITECTURES, EOS_ID, PAD_ID, build_base, build_rim

QUESTIONS = ["2+3 is", "what is 17 times 4?", "x", "why not", "8+9 is", "y"]
DONORS = ["9*8 is", "how is 25 under 6??", "z", "who can", "2+3 is", "x"]
TEMPLATES = Templates(prompt="Q {question} A")
STEPS = 4


class Letters(Task):
    """Answers are compared letter by letter."""

    name = "letters"

    def is_correct(self, text: str, gold: str) -> bool:
        return text == gold


class Verified(Letters):
    """About a question, an answer need not have its row's exclamation mark."""

    name = "verified"

    def about(self, question: Question) -> Task:
        bound = Verified()
        object.__setattr__(bound, "question", question)
        return bound

    def is_correct(self, text: str, gold: str) -> bool:
        return text == gold or (hasattr(self, "question") and text.rstrip("!") == gold.rstrip("!"))


@contextmanager
def _projections(model: PeftModel, change: Any) -> Iterator[None]:
    """Call ``change(name, output)`` after each key and value projection; what it returns, if anything, is used."""
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: change(name, output))
        for name, module in model.named_modules()
        if name.endswith(("k_proj", "v_proj", "attn.c_attn"))
    ]
    assert len(handles) == model.config.num_hidden_layers * (1 if model.config.model_type == "gpt2" else 2)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _reference(model: PeftModel, prompt: list[int], donor: list[int], *, num_swapped: int) -> tuple[list[int], Tensor]:
    """The greedy answer and its tokens' log-probabilities, one full forward pass a token and no cache."""
    config = active_config(model)
    blocks = config.block_tokens
    memory = blocks.ids(config.num_blocks)
    stop = len(prompt) + min(num_swapped * blocks.length, len(memory) - 1)
    recorded: dict[str, Tensor] = {}
    with _projections(model, lambda name, output: recorded.update({name: output.clone()})):
        model(input_ids=torch.tensor([[*donor, *memory]]))

    def replace(name: str, output: Tensor) -> Tensor:
        output = output.clone()
        first = model.config.hidden_size if name.endswith("c_attn") else 0  # queries come first there, and stay
        output[:, len(prompt) : stop, first:] = recorded[name][:, len(prompt) : stop, first:]
        return output

    answer: list[int] = []
    scores = []
    with _projections(model, replace):
        while len(answer) < STEPS and EOS_ID not in answer:
            logits = model(input_ids=torch.tensor([[*prompt, *memory, *answer]])).logits[0, -1]
            answer.append(int(logits.argmax()))
            scores.append(logits.log_softmax(-1)[answer[-1]])
    return answer, torch.stack(scores)


def _prompts(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[list[int]]:
    return [tokenizer(f"Q {question} A")["input_ids"] for question in questions]


def _examples(questions: list[str], answers: list[str]) -> list[Example]:
    return [Example(question, answer) for question, answer in zip(questions, answers, strict=True)]


def _deep_rim(architecture: str, **options: Any) -> Any:
    """Three blocks, and layers enough that the question comes through a window or from an insertion layer to them."""
    depth = {"n_layer": 3} if architecture == "gpt2" else {"num_hidden_layers": 4}
    if architecture == "gemma3":
        depth["layer_types"] = ["sliding_attention", "full_attention"] * 2  # type: ignore[assignment]
    return build_rim(base=build_base(architecture, **depth), num_blocks=3, **options)


@pytest.mark.parametrize("num_swapped", [1, 2, 3])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "up_proj"]}),
        ("llama", {"bidirectional_blocks": True}),
        ("llama", {"insertion_layer": 1}),
        ("gpt2", {}),
        ("qwen3", {}),
        ("gemma3", {}),
        ("mistral", {}),
    ],
)
def test_a_swap_equals_full_passes_with_replaced_projections(
    architecture: str, options: dict[str, Any], num_swapped: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = _deep_rim(architecture, **options)
    decoder = SwappingDecoder(model, eos_id=EOS_ID, pad_id=PAD_ID, max_new_tokens=STEPS)
    prompts, donors = _prompts(tokenizer, QUESTIONS), _prompts(tokenizer, DONORS)
    plain = decoder(prompts)
    found = decoder.swap(prompts, donors, num_swapped=num_swapped)
    for index, (prompt, donor) in enumerate(zip(prompts, donors, strict=True)):
        expected, scores = _reference(model, prompt, donor, num_swapped=num_swapped)
        assert found.token_ids[index] == [expected]
        torch.testing.assert_close(torch.tensor(found.log_probs[index][0]), scores, atol=1e-4, rtol=1e-4)
    first = torch.tensor([[row[0][0] for row in decoded.log_probs] for decoded in (plain, found)])
    assert (first[0] - first[1]).abs().max() > 1e-3  # else nothing was swapped
    assert decoder(prompts).token_ids == plain.token_ids  # a swap leaves no trace


@pytest.mark.parametrize("num_swapped", [1, None])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [*((name, {}) for name in ARCHITECTURES), ("llama", {"bidirectional_blocks": True, "insertion_layer": 1})],
)
def test_a_question_with_its_own_blocks_gets_the_plain_answer(
    architecture: str, options: dict[str, Any], num_swapped: int | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = _deep_rim(architecture, **options)
    settings: dict[str, Any] = {"templates": TEMPLATES, "max_new_tokens": 5}
    answers = answer_questions(model, tokenizer, QUESTIONS, **settings)
    swapped = answer_with_swapped_blocks(model, tokenizer, QUESTIONS, QUESTIONS, num_swapped=num_swapped, **settings)
    assert list(swapped) == list(answers)
    decoder = SwappingDecoder(model, eos_id=EOS_ID, pad_id=PAD_ID, max_new_tokens=5)
    prompts = _prompts(tokenizer, QUESTIONS)
    plain, found = decoder(prompts), decoder.swap(prompts, prompts, num_swapped=num_swapped)
    assert found.token_ids == plain.token_ids
    scores, expected = (torch.tensor([row[0][0] for row in decoded.log_probs]) for decoded in (found, plain))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 1e-3  # else any question's blocks would do


def test_answers_do_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=3)
    ids = shuffle_ids(model.peft_config["default"].block_tokens.ids(3), seed=0)
    for batch_size in (1, 4):
        settings: dict[str, Any] = {"templates": TEMPLATES, "max_new_tokens": 8, "batch_size": batch_size}
        swapped = list(answer_with_swapped_blocks(model, tokenizer, QUESTIONS, DONORS, **settings))
        shuffled = list(answer_with_memory_ids(model, tokenizer, QUESTIONS, ids, **settings))
        if batch_size == 1:
            alone = swapped, shuffled
    assert alone == (swapped, shuffled)


def test_shuffled_memory_is_what_generate_says_after_such_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=3)
    ids = shuffle_ids(model.peft_config["default"].block_tokens.ids(3), seed=3)
    found = list(answer_with_memory_ids(model, tokenizer, QUESTIONS, ids, templates=TEMPLATES, max_new_tokens=5))
    answerer = MemoryAnswerer(model, tokenizer, ids, templates=TEMPLATES, max_new_tokens=5)
    prompts = answerer.encode(QUESTIONS)
    assert [answerer.read(answer) for answer in answerer.generate(prompts)] == found
    for prompt, text in zip(_prompts(tokenizer, QUESTIONS), found, strict=True):
        output = model.generate(
            input_ids=torch.tensor([[*prompt, *ids]]), max_new_tokens=5, do_sample=False, pad_token_id=PAD_ID
        )
        expected = str(tokenizer.decode(output[0, len(prompt) + len(ids) :], skip_special_tokens=True))
        assert text == expected.strip()


def test_random_rows_come_and_go() -> None:
    model = build_rim()
    memory = model.get_base_model().get_input_embeddings()
    rows = memory.rows("default")
    own, state = rows.detach().clone(), torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with random_rows(model, seed=seed):
            drawn.append(rows.detach().clone())
        assert torch.equal(rows, own)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    spread = memory.weight.detach().std(0)
    deviations = (torch.stack(drawn[1:]) - memory.weight.detach().mean(0)) / spread
    assert deviations.std().item() == pytest.approx(1.0, abs=0.2)  # 192 numbers


def test_rows_are_restored_when_a_control_fails(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_rim()
    rows = model.get_base_model().get_input_embeddings().rows("default")
    own = rows.detach().clone()
    during = []

    def answer(*args: Any, num_blocks: int | None = None, **options: Any) -> Iterator[str]:
        if num_blocks is None:
            during.append(rows.detach().clone())
            raise RuntimeError("out of memory")
        return answer_questions(*args, num_blocks=num_blocks, **options)

    monkeypatch.setattr(controls, "answer_questions", answer)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_controls(model, tokenizer, _examples(["a", "b"], ["1", "2"]), Letters(), max_new_tokens=2)
    assert not torch.equal(during[0], own)
    assert torch.equal(rows, own)


def _chained_model() -> PeftModel:
    """A model whose answers can know the question through the blocks alone.

    A token sees itself and as many before it as a block has: the first one of a block sees the block before and not the
    prompt. With another question's first blocks, whatever their number, its answers are the other's.
    """
    base = build_base("mistral", sliding_window=4, num_hidden_layers=6)
    return build_rim(base=base, num_blocks=3, block_size=1)


@pytest.mark.parametrize(("task", "mark"), [(Letters(), ""), (Verified(), "!")])
def test_a_model_that_thinks_in_blocks_follows_them(tokenizer: PreTrainedTokenizerFast, task: Task, mark: str) -> None:
    model = _chained_model()
    questions = [f"{first}{second}" for first in "abc" for second in "+-*/"]
    options: dict[str, Any] = {"templates": Templates(prompt="{question}"), "max_new_tokens": 6}
    texts = list(answer_questions(model, tokenizer, questions, **options))
    examples = [Example(q, text + mark, ("s", f"1 {q}", f"2 {q}")) for q, text in zip(questions, texts, strict=True)]
    assert len(set(texts)) > 3
    found = run_controls(
        model,
        tokenizer,
        examples,
        task,
        **options,
        batch_size=5,
        counterfactual=lambda _example, donor, _count: donor.answer.rstrip("!"),
    )
    names = ["removed", "shuffled", "random rows", "swapped", "swapped after 1", "swapped after 2"]
    assert [control.name for control in found] == names
    for control in found[:3]:
        assert control.follows is None
        assert control.accuracy.num_rows == 12
    for control in found[3:]:
        assert control.follows is not None
        assert (control.accuracy.num_correct, control.accuracy.num_rows) == (0, 12)
        assert (control.follows.num_correct, control.follows.num_rows) == (12, 12)
        assert list(control.by_length) == [3]
        assert "0 of 12 rows have no partner" in control.description


def test_a_model_that_does_not_follow_is_told_apart(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model = _chained_model()
    questions = ["a+", "a-", "b+", "b-", "long"]
    answers = ["1", "2", "1", "2", "1"]
    examples = [Example(q, answer, ("s", answer, "u")) for q, answer in zip(questions, answers, strict=True)]

    def counterfactual(example: Example, donor: Example, count: int) -> str:
        return f"{example.answer}{donor.answer}{count}"

    found = run_controls(
        model, tokenizer, examples, Letters(), max_new_tokens=3, counterfactual=counterfactual, progress=True
    )
    assert any("swapped after 2" in message for message in caplog.messages)
    # Steps differ in the second alone, which is what block 1 holds; "long" has nobody of its length.
    assert [control.name for control in found][3:] == ["swapped", "swapped after 1"]
    for control in found[3:]:
        assert control.follows is not None
        assert (control.follows.num_correct, control.follows.num_rows) == (0, 4)
        assert "1 of 5 rows have no partner" in control.description


def test_a_control_is_written_as_results_take_it() -> None:
    score = controls.Score(1, 4)
    control = Control("swapped", "all of them", score, {2: score}, follows=None)
    assert control.to_dict() == {
        "name": "swapped",
        "description": "all of them",
        "accuracy": score.to_dict(),
        "by_length": {"2": score.to_dict()},
        "follows": None,
    }
    assert Control("swapped", "", score, {}, follows=score).to_dict()["follows"] == score.to_dict()


def test_what_cannot_be_controlled_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=2)
    decoder = SwappingDecoder(model, eos_id=EOS_ID, pad_id=PAD_ID)
    with pytest.raises(ValueError, match=r"as many and as long as the prompts, \[1\] tokens, got \[2\]"):
        decoder.swap([[5]], [[5, 6]])
    with pytest.raises(ValueError, match="num_swapped: must be at most the number of blocks, 2, got 3"):
        decoder.swap([[5]], [[6]], num_swapped=3)
    with pytest.raises(ValueError, match="num_swapped: must be an integer of at least 1, got 0"):
        decoder.swap([[5]], [[6]], num_swapped=0)
    with pytest.raises(ValueError, match="donors: must be as many"):
        list(answer_with_swapped_blocks(model, tokenizer, ["a"], ["a", "b"]))
    examples = _examples(["a"], ["1"])
    with pytest.raises(ValueError, match="examples: there are none"):
        run_controls(model, tokenizer, [], Letters())
    with model.disable_adapter(), pytest.raises(ValueError, match="model: exchanging memory needs"):
        run_controls(model, tokenizer, examples, Letters())
    with pytest.raises(ValueError, match="num_blocks: must be an integer of at least 1, got 0"):
        run_controls(build_rim(num_blocks=0), tokenizer, examples, Letters())
