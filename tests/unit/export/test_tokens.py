"""Tokenizers of exports: blocks behind texts and chats, once, whatever the tokenizer did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from rim_peft.export.tokens import (
    MemoryTokens,
    add_memory_tokens,
    append_blocks,
    save_tokenizer,
    set_variables,
    with_tokens_of,
)
from tests.conftest import BOS_ID, CHAT_TEMPLATE, EOS_ID, VOCAB_SIZE, build_tokenizer

BLOCKS = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE + 2] * 2
CHAT = [{"role": "user", "content": "hi"}]


def export(tokenizer: Any, tmp_path: Path, append_to: str = "auto") -> tuple[Any, MemoryTokens]:
    """The tokenizer as a user of the export has it: read from its files."""
    extended, memory = add_memory_tokens(tokenizer, num_blocks=2, block_size=2)
    append_blocks(extended, memory, append_to)
    save_tokenizer(extended, tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path), memory


def rendered(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def test_a_text_gets_its_blocks_at_its_end(tmp_path: Path) -> None:
    plain = build_tokenizer()
    tokenizer, memory = export(plain, tmp_path)
    assert memory.block_ids == BLOCKS
    assert tokenizer("ab")["input_ids"] == [*plain("ab")["input_ids"], *BLOCKS]
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == plain("ab")["input_ids"]
    batch = tokenizer(["abc", "d"], padding=True)
    assert [row[-8:] for row in batch["input_ids"]] == [BLOCKS, BLOCKS]
    assert batch["attention_mask"][1] == [0, 0, *[1] * 9]  # padding stands on the left
    assert tokenizer.decode(tokenizer("ab")["input_ids"], skip_special_tokens=True) == "ab"
    assert len(plain) == VOCAB_SIZE  # the tokenizer that was given is as it was


def test_what_stands_before_a_text_stays_and_what_stands_behind_gives_way(tmp_path: Path) -> None:
    plain = build_tokenizer()
    plain.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<bos> $A <eos>",
                pair="<bos> $A $B <eos>",
                special_tokens=[("<bos>", BOS_ID), ("<eos>", EOS_ID)],
            ),
        ]
    )
    bare = plain("ab", add_special_tokens=False)["input_ids"]
    assert plain("ab")["input_ids"] == [BOS_ID, *bare, EOS_ID]
    tokenizer, _ = export(plain, tmp_path)
    assert tokenizer("ab")["input_ids"] == [BOS_ID, *bare, *BLOCKS]


@pytest.mark.parametrize("end", ["", "\n", "  "])
def test_a_chat_gets_its_blocks_once_where_texts_get_them_too(tmp_path: Path, end: str) -> None:
    plain = build_tokenizer(chat_template=CHAT_TEMPLATE + end)
    tokenizer, memory = export(plain, tmp_path)
    assert rendered(tokenizer) == [*rendered(plain), *BLOCKS]
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text == plain.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False) + memory.block_text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == rendered(tokenizer)
    answered = [*CHAT, {"role": "assistant", "content": "yes"}]  # no turn is opened: nothing to think about
    assert memory.names[0] not in tokenizer.apply_chat_template(answered, tokenize=False)


def test_every_named_template_gets_the_blocks(tmp_path: Path) -> None:
    plain = build_tokenizer(chat_template={"default": CHAT_TEMPLATE, "other": "other:" + CHAT_TEMPLATE})
    tokenizer, memory = export(plain, tmp_path)
    for name in ("default", "other"):
        text = tokenizer.apply_chat_template(CHAT, chat_template=name, add_generation_prompt=True, tokenize=False)
        assert text.count(memory.block_text) == 1
        assert text.endswith(memory.block_text)


@pytest.mark.parametrize(
    ("append_to", "to_text", "to_chat"),
    [("auto", True, True), ("prompt", True, False), ("chat", False, True), ("none", False, False)],
)
def test_where_blocks_are_appended(tmp_path: Path, append_to: str, to_text: bool, to_chat: bool) -> None:
    extended, memory = add_memory_tokens(build_tokenizer(), num_blocks=2, block_size=2)
    assert append_blocks(extended, memory, append_to) == {"prompt": to_text, "chat": to_chat}
    assert (extended("ab")["input_ids"][-8:] == BLOCKS) is to_text
    assert (rendered(extended)[-8:] == BLOCKS) is to_chat
    assert extended("ab" + memory.block_text, add_special_tokens=False)["input_ids"][-8:] == BLOCKS


def test_a_second_adapter_gets_tokens_of_its_own() -> None:
    first, _ = add_memory_tokens(build_tokenizer(), num_blocks=1, block_size=1)
    second, memory = add_memory_tokens(first, num_blocks=1, block_size=1)
    assert memory.ids == [VOCAB_SIZE + 3, VOCAB_SIZE + 4, VOCAB_SIZE + 5]
    assert memory.names == ["<|rim_begin_2|>", "<|rim_memory_2|>", "<|rim_end_2|>"]
    assert second(memory.block_text)["input_ids"] == memory.block_ids


def test_what_cannot_be_asked_for() -> None:
    tokenizer, memory = add_memory_tokens(build_tokenizer(chat_template=None), num_blocks=1, block_size=1)
    with pytest.raises(ValueError, match="append_to: must be one of auto, prompt, chat, none, got 'all'"):
        append_blocks(tokenizer, memory, "all")
    with pytest.raises(ValueError, match="append_to: must not be 'chat' for a tokenizer without chat template"):
        append_blocks(tokenizer, memory, "chat")


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        pass

    slow: Any = Slow()
    with pytest.raises(ValueError, match=r"tokenizer: must be a fast one.* got Slow"):
        add_memory_tokens(slow, num_blocks=1, block_size=1)


THINKING = (
    "\n{% macro end() %}{% if enable_thinking is false %}<off>{% endif %}{% endmacro %}"
    f"{CHAT_TEMPLATE}{{{{ end() }}}}{{{{ day }}}}"
)


@pytest.mark.parametrize("template", [THINKING, {"default": THINKING, "other": "other:" + THINKING}])
def test_an_exports_template_has_the_variables_of_the_training(tmp_path: Path, template: Any) -> None:
    variables = {"enable_thinking": False, "day": 'it\'s "{% now %}"\né', "list": [1, None, {"a": True}]}
    plain = build_tokenizer(chat_template=template)
    extended, memory = add_memory_tokens(plain, num_blocks=2, block_size=2)
    set_variables(extended, variables)
    append_blocks(extended, memory)
    save_tokenizer(extended, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    trained = plain.apply_chat_template(CHAT, **variables, **options)
    assert "<off>" in trained
    assert tokenizer.apply_chat_template(CHAT, **options) == trained + memory.block_text
    other = {**variables, "enable_thinking": True}
    assert tokenizer.apply_chat_template(CHAT, enable_thinking=True, **options) == (
        plain.apply_chat_template(CHAT, **other, **options) + memory.block_text
    )


def test_variables_are_for_templates_only() -> None:
    tokenizer = build_tokenizer(chat_template=None)
    set_variables(tokenizer, {"a": 1})
    assert tokenizer.chat_template is None


def test_a_tokenizer_gets_the_tokens_of_another_one_and_stays_itself_otherwise() -> None:
    first, _ = add_memory_tokens(build_tokenizer(), num_blocks=2, block_size=2)
    own = build_tokenizer(chat_template="{{ messages[0].content }}")
    both = with_tokens_of(own, first)
    assert both.get_vocab() == first.get_vocab()
    assert both.chat_template == own.chat_template
    assert len(own) == VOCAB_SIZE
    own.add_tokens(["<think>"], special_tokens=True)
    with pytest.raises(
        ValueError, match=rf"tokenizer: must have the tokens .* got '<think>' with id {VOCAB_SIZE}, whi"
    ):
        with_tokens_of(own, first)
