"""Conversations with a kept cache, against fresh prompts: the same tokens, log-probabilities and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rim_peft.data.chats import Chat
from rim_peft.data.examples import RowError, Templates
from rim_peft.data.tokenization import tokenize_example
from rim_peft.inference import BlockAnswerer, decoding
from rim_peft.inference.passes import Passes, Prediction
from rim_peft.tasks import get_task
from rim_peft.tuner.memory_embedding import MemoryEmbedding
from tests.conftest import CHAT_TEMPLATE, build_rim, build_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = ["What is 1 + 1?", "And é + 2?", "Why?", "So what?"]

# Earlier answers are written otherwise than the last one, as by templates that drop thinking.
REWRITING = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message.role == 'user' and not loop.last %}(then) "
    "{% endif %}{{ message['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def answerer_of(model: Any, *, template: str = CHAT_TEMPLATE, **options: Any) -> BlockAnswerer:
    return BlockAnswerer(model, build_tokenizer(chat_template=template), **{"max_new_tokens": 6, **options})


def record_trunks(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    found = []
    finish = Passes.finish_trunk

    def record(self: Passes, *args: Any) -> Prediction:
        found.append(finish(self, *args))
        return found[-1]

    monkeypatch.setattr(Passes, "finish_trunk", record)
    return found


def assert_as_fresh(answerer: BlockAnswerer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Four turns give what fresh prompts give; returns how many tokens each turn used again."""
    trunks = record_trunks(monkeypatch)
    conversation = answerer.conversation([SYSTEM])
    num_kept = []
    for text in TURNS:
        messages = [*conversation.messages, {"role": "user", "content": text}]
        (fresh,) = answerer.answer([messages])
        (prompt,) = answerer.encode([messages])
        decoded = answerer.decoder([prompt])
        assert conversation.answer(text) == fresh != ""
        assert conversation.messages == [*messages, {"role": "assistant", "content": fresh}]
        assert int(trunks[-1].tokens) == decoded.token_ids[0][0][0]
        assert_close(trunks[-1].log_probs[0, 0].item(), decoded.log_probs[0][0][0], atol=1e-4, rtol=1e-4)
        assert_close(trunks[-1].states.cpu(), decoded.states, atol=1e-4, rtol=1e-4)
        kept = conversation._kept
        assert kept.ids == list(prompt)
        assert kept.cache.get_seq_length() == len(prompt)  # no block stays
        num_kept.append(conversation.num_kept)
    return num_kept


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mistral"])
def test_four_turns_are_as_fresh(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *later = assert_as_fresh(answerer_of(build_rim(architecture)), monkeypatch)
    assert first == 0
    assert all(count > 20 for count in later)
    assert later == sorted(later)


@pytest.mark.parametrize(
    "options", [{"num_blocks": 0}, {"insertion_layer": 1}, {"bidirectional_blocks": True}, {"num_blocks": 1}]
)
def test_with_variants_of_blocks_too(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_as_fresh(answerer_of(build_rim(**options)), monkeypatch)[-1] > 20


def test_a_template_that_rewrites_earlier_turns_leaves_a_short_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    num_kept = assert_as_fresh(answerer_of(build_rim(), template=REWRITING), monkeypatch)
    beginning = len("<|system|>Be brief.<eos><|user|>") - len("|system|>") - len("eos>") - len("|user|>")
    assert num_kept[1] == beginning


def test_a_template_that_changes_its_beginning_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ 'ABCDEFGHI'[messages | length] }}" + CHAT_TEMPLATE
    assert assert_as_fresh(answerer_of(build_rim(), template=template), monkeypatch) == [0, 0, 0, 0]


def test_without_a_decoder_turns_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with recurrent layers, whose states cannot be cropped."""
    answerer = answerer_of(build_rim())
    expected = [answerer.conversation([SYSTEM]).answer(text) for text in TURNS]
    monkeypatch.setattr("rim_peft.inference.block_answerer.can_decode", lambda model: False)
    conversation = answerer.conversation([SYSTEM])
    assert conversation.answer(TURNS[0]) == expected[0]
    messages = [*conversation.messages, {"role": "user", "content": TURNS[1]}]
    assert conversation.answer(TURNS[1]) == next(answerer.answer([messages]))
    assert conversation.num_kept == 0


def test_a_disabled_adapter_answers_as_the_base() -> None:
    model = build_rim()
    answerer = answerer_of(model)
    with model.disable_adapter():
        conversation = answerer.conversation()
        assert conversation.answer("Hi") == next(answerer.answer([[{"role": "user", "content": "Hi"}]]))


def test_pieces_join_to_the_answer_and_come_while_it_is_decoded() -> None:
    answerer = answerer_of(build_rim(), max_new_tokens=24)
    passes: list[int] = []
    extend = answerer.decoder._passes.extend
    answerer.decoder._passes.extend = lambda *args: passes.append(1) or extend(*args)  # type: ignore[method-assign]
    conversation, seen, pieces = answerer.conversation(), [], []
    for piece in conversation.stream("é?"):
        pieces.append(piece)
        seen.append(len(passes))
    assert "".join(pieces) == conversation.messages[-1]["content"]
    assert len(pieces) > 1
    assert seen[0] < seen[-1]
    assert all(pieces)


def test_a_stream_that_is_stopped_is_taken_back() -> None:
    answerer = answerer_of(build_rim(), max_new_tokens=24)
    conversation = answerer.conversation()
    stream = conversation.stream("Hi")
    next(stream)
    stream.close()
    assert conversation.messages == []
    assert conversation.answer("Hi") == answerer.conversation().answer("Hi")
    assert conversation.num_kept > 0  # the prompt's keys and values are known, and the blocks behind them are gone


def test_an_interrupted_pass_leaves_no_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = answerer_of(build_rim())
    conversation = answerer.conversation()
    conversation.answer("Hi")
    before = conversation.messages
    with monkeypatch.context() as patch:
        patch.setattr(MemoryEmbedding, "forward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            conversation.answer("Why?")
    assert conversation.messages == before
    fresh = answerer.conversation(before)
    assert conversation.answer("Why?") == fresh.answer("Why?")


def test_an_empty_answer_is_no_turn() -> None:
    answerer = answerer_of(build_rim())
    answerer.read = lambda token_ids: ""  # type: ignore[method-assign]
    conversation = answerer.conversation()
    assert conversation.answer("Hi") == ""
    assert conversation.messages == []


def test_cut_answers_are_told() -> None:
    answerer, cut = answerer_of(build_rim(), max_new_tokens=2), []
    answer = answerer.conversation().answer("Hi", on_cut=cut.append)
    assert cut == [answer]


def test_variables_and_tools_are_those_of_a_question() -> None:
    template = CHAT_TEMPLATE + "{{ tools | tojson if tools }}{{ day }}"
    answerer = answerer_of(build_rim(), template=template)
    options: Any = {"tools": [{"name": "add"}], "chat_template_kwargs": {"day": "Monday"}}
    user = {"role": "user", "content": "Hi"}
    assert answerer.conversation(**options).answer("Hi") == next(answerer.answer([Chat([user], **options)]))
    (prompt,) = answerer.encode([Chat([user], **options)])
    assert answerer.tokenizer.decode(prompt).endswith('<|assistant|>[{"name": "add"}]Monday')


@pytest.mark.parametrize(
    ("template", "said"), [("{answer}", "4"), (" {answer}\n", "4"), ("<bos>It is {answer}.", "It is 4.")]
)
def test_a_later_turns_prompt_is_that_of_its_training(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have chains and answers in one text; the model says the answer alone, in the words of the template."""
    turns = ["2 + 2?", "<think>easy</think>2+2=4\n#### 4", "Doubled?", "4*2=8\n#### 8"]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, turns, strict=True)]
    task = get_task("rows", answer_from="after:####", split_steps="lines", turns="all")
    answerer = answerer_of(build_rim(), templates=Templates(answer=template))
    first, second = (
        tokenize_example(task.read_row(row), answerer.tokenizer, answerer.templates)
        for row in task.split_row({"messages": messages})
    )
    conversation = answerer.conversation()
    monkeypatch.setattr(answerer, "stream", lambda prompt, kept: iter(first["answer_ids"]))
    assert conversation.answer(turns[0]) == said
    asked = conversation.messages
    assert answerer.encode([[*asked, messages[2]]])[0] == second["prompt_ids"]
    assert second["prompt_ids"][: len(first["prompt_ids"])] == first["prompt_ids"]
    assert answerer.tokenizer.decode(second["prompt_ids"]).count(said) == 1


def test_what_cannot_be_asked_is_named() -> None:
    conversation = answerer_of(build_rim()).conversation()
    with pytest.raises(RowError, match=r"messages\[0\]: question\[0\]\.content: is empty"):
        conversation.answer(" ")
    with pytest.raises(RowError, match=r"prompt \(\d+ tokens\), blocks \(8\) and answer \(6\) must fit"):
        conversation.answer("long " * 200)
    assert conversation.messages == []
    bare = answerer_of(build_rim(), template="")
    with pytest.raises(ValueError, match="tokenizer: must have a chat template"):
        bare.conversation().answer("Hi")
    compiled = decoding.BlockDecoder(build_rim(), eos_id=None, pad_id=0)
    compiled._passes = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="compiled: must be False for streams"):
        next(compiled.stream([5], conversation._kept))
    torch.manual_seed(0)
