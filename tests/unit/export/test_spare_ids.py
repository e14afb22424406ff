"""Which ids of a base hold memory rows: reserved names first, then rows without a token, then special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rim_peft.export.spare_ids import check_unused, find_spare_ids, name_spare_ids
from rim_peft.export.tokens import add_memory_tokens
from tests.conftest import VOCAB_SIZE, build_base, build_tokenizer

RESERVED = ["<|reserved_special_token_0|>", "<unused7>", "[control_3]", "<|placeholder4|>"]


def extended(*names: str, special: bool = True) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=special) for name in names], special_tokens=special)
    return tokenizer


def base(more_rows: int) -> Any:
    return build_base(vocab_size=VOCAB_SIZE + more_rows)


def test_the_last_reserved_names_come_first() -> None:
    assert find_spare_ids(extended(*RESERVED), base(9)) == [VOCAB_SIZE + 1, VOCAB_SIZE + 2, VOCAB_SIZE + 3]
    assert find_spare_ids(extended(*RESERVED, special=False), base(9))[0] == VOCAB_SIZE + 1


def test_then_rows_after_the_last_token_and_then_special_tokens_without_a_use() -> None:
    tokenizer = extended("<repo_name>", "<file_sep>", "<jupyter>", "<image>")
    assert find_spare_ids(tokenizer, base(7)) == [VOCAB_SIZE + 4, VOCAB_SIZE + 5, VOCAB_SIZE + 6]
    assert find_spare_ids(tokenizer, base(4)) == [VOCAB_SIZE + 1, VOCAB_SIZE + 2, VOCAB_SIZE + 3]
    tokenizer.chat_template = "{{ messages }}<image>"
    assert find_spare_ids(tokenizer, base(4)) == [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
    tokenizer.eos_token = "<jupyter>"  # noqa: S105 - a special token, not a password
    stopping = base(4)
    with pytest.raises(ValueError, match=r"got 0, 0 and [0-2] of these kinds\. Use --format peft-lora"):
        find_spare_ids(tokenizer, stopping)


def test_a_base_without_a_row_for_its_tokens_has_none() -> None:
    with pytest.raises(ValueError, match="base: must have 3 token ids that no text uses"):
        find_spare_ids(extended(*RESERVED), base(0))


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([7, 8], "must be 3 different ids"),
        ([7, 8, 8], "must be 3 different ids"),
        ([7, 8, VOCAB_SIZE + 5], f"must be ids from 0 to {VOCAB_SIZE + 4}"),
        ([7, 8, VOCAB_SIZE], f"must be ids of the tokenizer .below {VOCAB_SIZE}. or the 3 after its last one"),
        ([7, 8, 2], "must not be used by the tokenizer, its chat template or the generation settings, as 2 is"),
    ],
)
def test_given_ids_are_checked(ids: list[int], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"spare_ids: {problem}"):
        find_spare_ids(build_tokenizer(), base(5), ids)


@pytest.mark.parametrize("start", [20, VOCAB_SIZE])
def test_a_copy_of_the_tokenizer_reads_the_blocks_as_tokens(start: int) -> None:
    ids = [start, start + 1, start + 2]
    plain = build_tokenizer()
    assert find_spare_ids(plain, base(5), ids) == ids
    tokenizer, memory = name_spare_ids(plain, ids, num_blocks=2, block_size=1)
    assert memory.ids == ids
    assert tokenizer(f"a{memory.block_text}", add_special_tokens=False)["input_ids"][1:] == ids * 2
    assert len(plain) == VOCAB_SIZE
    check_unused(memory, [[1, 2], [3]])
    with pytest.raises(ValueError, match=rf"the checked prompts or their answers have {start + 1} "):
        check_unused(memory, [[1, 2], [start + 1]])


def test_gaps_among_a_tokenizers_ids_are_not_taken_for_its_end() -> None:
    """A tokenizer of V tokens whose last one has the id V + 1: the library would give new tokens the ids V, V + 1."""
    vocabulary = {**build_tokenizer().get_vocab(), "zz": VOCAB_SIZE + 2}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<bos>", "<eos>")])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    assert (len(tokenizer), tokenizer.convert_tokens_to_ids("zz")) == (VOCAB_SIZE + 1, VOCAB_SIZE + 2)
    with pytest.raises(ValueError, match=r"got 0, 0 and 0 of these kinds"):
        find_spare_ids(tokenizer, base(20))
    with pytest.raises(
        ValueError, match=rf"without gaps, .* got {VOCAB_SIZE + 1} tokens with ids up to {VOCAB_SIZE + 2}"
    ):
        add_memory_tokens(tokenizer, num_blocks=1, block_size=1)
    assert name_spare_ids(tokenizer, [20, 21, 22], num_blocks=1, block_size=1)[1].ids == [20, 21, 22]
