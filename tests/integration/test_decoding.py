"""Answers decoded side by side from one cache, against one `generate` and one plain forward for each of them."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedTokenizerFast,
)

from rim_peft.data.examples import Templates
from rim_peft.export.folder import Prompts
from rim_peft.export.weights import as_plain
from rim_peft.inference import BlockDecoder, Decoded, answer_questions
from rim_peft.inference.swapping import random_rows
from tests.conftest import ARCHITECTURES, PAD_ID, VOCAB_SIZE, build_base, build_rim, build_tokenizer

torch.manual_seed(0)
PROMPTS = [torch.randint(6, VOCAB_SIZE, (length,)).tolist() for length in (9, 1, 14)]
PLAIN = Templates(prompt="{question}")


def _decoder(model: Any, **options: Any) -> BlockDecoder:
    return BlockDecoder(model, **{"eos_id": None, "pad_id": PAD_ID, "max_new_tokens": 4, **options})


def _generate(model: Any, prompt: list[int], num_blocks: int, *, length: int = 4) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        num_blocks=num_blocks,
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=PAD_ID,
        eos_token_id=None,
    )
    return output[0, len(prompt) :].tolist()


def _check_scores(model: Any, found: Decoded, *, num_blocks: int, atol: float = 1e-4) -> None:
    """Compare every block's log-probabilities and states with those of a plain forward over its sequence."""
    blocks = model.peft_config["default"].block_tokens
    for prompt, ids, scores, states in zip(PROMPTS, found.token_ids, found.log_probs, found.states, strict=True):
        for k in range(1, num_blocks + 1):
            trunk = [*prompt, *blocks.ids(k)]
            with torch.no_grad():
                output = model(input_ids=torch.tensor([[*trunk, *ids[k - 1]]]), output_hidden_states=True)
            log_probs = output.logits[0, len(trunk) - 1 : -1].float().log_softmax(-1)
            expected = log_probs[range(len(ids[k - 1])), ids[k - 1]]
            torch.testing.assert_close(torch.tensor(scores[k - 1]), expected, atol=atol, rtol=atol)
            state = output.hidden_states[-1][0, len(trunk) - 1].float()
            torch.testing.assert_close(states[k - 1], state, atol=atol, rtol=atol)


@contextmanager
def _record_passes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Note the shape of the ids of every forward pass."""
    shapes: list[tuple[int, ...]] = []
    hook = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("attention", "num_blocks"), [("eager", 1), ("sdpa", 2), ("eager", 4)])
def test_every_block_equals_separate_generation(architecture: str, attention: str, num_blocks: int) -> None:
    model = build_rim(base=build_base(architecture, attn_implementation=attention), num_blocks=num_blocks)
    found = _decoder(model, every_block=True)(PROMPTS)
    for prompt, answers in zip(PROMPTS, found.token_ids, strict=True):
        assert answers == [_generate(model, prompt, k) for k in range(1, num_blocks + 1)]
    _check_scores(model, found, num_blocks=num_blocks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_blocks", [0, 3])
def test_the_last_block_equals_generation(architecture: str, num_blocks: int) -> None:
    model = build_rim(architecture)
    found = _decoder(model, num_blocks=num_blocks)(PROMPTS)
    assert found.token_ids == [[_generate(model, prompt, num_blocks)] for prompt in PROMPTS]


@pytest.mark.parametrize("every_block", [True, False])
def test_a_batch_equals_its_rows_alone(every_block: bool) -> None:
    decoder = _decoder(build_rim(num_blocks=3), every_block=every_block)
    together = decoder(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = decoder([prompt])
        assert alone.token_ids == [together.token_ids[row]]
        torch.testing.assert_close(torch.tensor(alone.log_probs[0]), torch.tensor(together.log_probs[row]))
        torch.testing.assert_close(alone.states[0], together.states[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("every_block", [True, False])
def test_states_are_picked_by_numbers_which_have_no_device(every_block: bool) -> None:
    model = build_rim(num_blocks=2)
    kept: list[Any] = []
    hook = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs["logits_to_keep"]), with_kwargs=True
    )
    _decoder(model, every_block=every_block)(PROMPTS)
    hook.remove()
    # Accelerate moves what a spread base is given to its first device; its last states could not be indexed with that.
    assert kept == [[17, 21] if every_block else [21], 0, 0, 0]


def test_bases_with_layers_on_disk(tmp_path: Path) -> None:
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places.update({"model.embed_tokens": "cpu", "lm_head": "disk"})
    base = dispatch_model(build_base(), places, main_device="cpu", offload_dir=str(tmp_path))
    model = build_rim(base=base, num_blocks=2, target_modules=["q_proj"], layers_to_transform=[1])
    found = _decoder(model, every_block=True)(PROMPTS)
    for prompt, answers in zip(PROMPTS, found.token_ids, strict=True):
        assert answers == [_generate(model, prompt, k) for k in (1, 2)]


@pytest.mark.parametrize("init_memory", ["vocabulary", "random", [5, 6, 7]])
def test_bases_with_their_embedding_on_disk(tmp_path: Path, init_memory: Any) -> None:
    parts = ["model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = {"model.embed_tokens": "disk", **dict.fromkeys(parts, "cpu")}
    base = dispatch_model(build_base(), places, main_device="cpu", offload_dir=str(tmp_path))
    model, whole = build_rim(base=base, init_memory=init_memory), build_rim(init_memory=init_memory)
    rows = whole.base_model.memory.rows("default")
    torch.testing.assert_close(model.base_model.memory.rows("default"), rows, atol=0, rtol=0)
    assert _decoder(model)(PROMPTS).token_ids == _decoder(whole)(PROMPTS).token_ids
    model.base_model.memory._move_adapter_to_device_of_base_layer("default")
    torch.testing.assert_close(model.base_model.memory.rows("default"), rows, atol=0, rtol=0)
    with random_rows(model, seed=0):
        drawn = model.base_model.memory.rows("default").detach().clone()
    with random_rows(whole, seed=0):
        torch.testing.assert_close(drawn, whole.base_model.memory.rows("default").detach())
    with pytest.raises(ValueError, match=r"model: must have its weights in memory to be exported, got 1 "):
        as_plain(model, build_tokenizer(), Prompts([], Templates(), 4), num_blocks=2)


def test_rows_that_start_from_no_vocabulary_show_it() -> None:
    with torch.device("meta"):
        base = build_base()
    rows = build_rim(base=base, r=0, fresh=True).base_model.memory.rows("default")
    assert bool(rows.isnan().all())


ROPE = {"rope_theta": 10000.0}
LONGROPE = {
    **ROPE,
    "rope_type": "longrope",
    "original_max_position_embeddings": 26,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0, 6.0, 4.0, 3.0],
}
DYNAMIC = {**ROPE, "rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(("rope", "positions"), [(LONGROPE, 512), (DYNAMIC, 26)])
def test_rotations_that_depend_on_the_longest_row_are_the_same_for_all_that_fit(
    rope: dict[str, Any], positions: int
) -> None:
    base = build_base(rope_parameters=rope, max_position_embeddings=positions)
    model = build_rim(base=base, num_blocks=2)
    found = _decoder(model, every_block=True)(PROMPTS)  # 14 + 8 + 4 positions
    for prompt, answers in zip(PROMPTS, found.token_ids, strict=True):
        assert answers == [_generate(model, prompt, k) for k in (1, 2)]
    with pytest.raises(ValueError, match=r"must fit into the base's 26 positions .* longrope original_max_position"):
        _decoder(model)([PROMPTS[0], [*PROMPTS[2], 7]])


@pytest.mark.parametrize(("every_block", "num_readouts"), [(True, 3), (False, 1)])
def test_all_answers_take_one_pass_over_the_trunk_and_one_a_token(every_block: bool, num_readouts: int) -> None:
    model = build_rim(num_blocks=3)
    decoder = _decoder(model, every_block=every_block, max_new_tokens=5)
    with _record_passes(model) as shapes:
        decoder(PROMPTS)
    assert shapes == [(3, 14 + 3 * 4), *[(3, num_readouts)] * 4]


def test_rows_that_are_done_leave_the_batch() -> None:
    model = build_rim(num_blocks=2)
    free = _decoder(model, max_new_tokens=8)(PROMPTS)
    # The first two answers end at once, the third does not.
    end = free.token_ids[0][0][0]
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    assert end not in free.token_ids[2][0]
    decoder = _decoder(model, max_new_tokens=8, eos_id=end)
    with _record_passes(model) as shapes:
        found = decoder(prompts)
    assert [rows for rows, _ in shapes] == [3, *[1] * 7]
    assert found.token_ids == [[[end]], free.token_ids[2], [[end]]]
    assert [len(row[0]) for row in found.log_probs] == [1, 8, 1]
    with _record_passes(model) as shapes:
        decoder(prompts[:1])
    assert len(shapes) == 1


def test_rows_stay_until_all_their_blocks_are_done() -> None:
    model = build_rim(num_blocks=4)
    free = _decoder(model, every_block=True, max_new_tokens=6)(PROMPTS)
    common = [answer[2] for row in free.token_ids for answer in row]
    end = max(set(common), key=common.count)
    found = _decoder(model, every_block=True, max_new_tokens=6, eos_id=end)(PROMPTS)
    for before, after, scores in zip(free.token_ids, found.token_ids, found.log_probs, strict=True):
        for answer, ended, its_scores in zip(before, after, scores, strict=True):
            assert ended == (answer[: answer.index(end) + 1] if end in answer else answer)
            assert len(its_scores) == len(ended)


def test_bfloat16_bases() -> None:
    model = build_rim(base=build_base().to(torch.bfloat16), num_blocks=3)
    found = _decoder(model, every_block=True)(PROMPTS)
    assert found.states.dtype == torch.float32
    # bfloat16 has 8 bits: products run in another order and differ by a few per cent.
    _check_scores(model, found, num_blocks=3, atol=0.2)


def test_a_merged_adapter_answers_the_same() -> None:
    model = build_rim(num_blocks=2)
    decoder = _decoder(model, every_block=True)
    expected = decoder(PROMPTS).token_ids
    model.merge_adapter()
    assert decoder(PROMPTS).token_ids == expected


def test_quantized_bases(tmp_path: Path) -> None:
    build_base(hidden_size=64, intermediate_size=128, initializer_range=0.1).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    model = build_rim(base=base, num_blocks=2)
    found = _decoder(model, every_block=True)(PROMPTS)
    for prompt, answers in zip(PROMPTS, found.token_ids, strict=True):
        assert answers == [_generate(model, prompt, k) for k in (1, 2)]


# Compiling takes a C++ compiler: part of many machines, but not of Python.
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"] if shutil.which("g++") or shutil.which("clang++") else [])
def test_compiled_passes_say_the_same_and_are_used_again(architecture: str) -> None:
    model = build_rim(architecture, num_blocks=3)
    compiled, eager = (_decoder(model, every_block=True, compiled=flag, batch_size=3) for flag in (True, False))
    found, expected = compiled(PROMPTS), eager(PROMPTS)
    assert found.token_ids == expected.token_ids
    torch.testing.assert_close(torch.tensor(found.log_probs), torch.tensor(expected.log_probs), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.states, expected.states, atol=1e-5, rtol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert compiled(PROMPTS[1:]).token_ids == expected.token_ids[1:]
        longer = [PROMPTS[0] * 7]  # 63 tokens
        assert compiled(longer).token_ids == eager(longer).token_ids
        assert compiled(PROMPTS).token_ids == expected.token_ids
    model.merge_adapter()
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        compiled(PROMPTS)
    with pytest.raises(ValueError, match="prompts: a compiled batch holds batch_size=3 at most, got 4"):
        compiled(PROMPTS[:1] * 4)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="compiling takes a C++ compiler")
def test_compiled_passes_go_with_their_decoder() -> None:
    def num_graphs() -> int:
        gc.collect()
        return sum(type(held).__name__ == "CompiledFxGraph" for held in gc.get_objects())

    model = build_rim(num_blocks=2)
    before = num_graphs()
    first, second = (_decoder(model, compiled=True, batch_size=3) for _ in range(2))
    expected = first(PROMPTS).token_ids
    after_one = num_graphs()
    assert second(PROMPTS).token_ids == expected
    assert before < after_one < num_graphs()
    del first
    assert num_graphs() == after_one
    with torch.compiler.set_stance("fail_on_recompile"):
        assert second(PROMPTS).token_ids == expected
    del second
    assert num_graphs() == before


def test_bases_that_cannot_branch_answer_after_the_last_block(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = build_rim(base=BloomForCausalLM(config).eval(), num_blocks=2)
    answers = list(answer_questions(model, tokenizer, ["2+3", "what?"], templates=PLAIN, max_new_tokens=4))
    for question, answer in zip(["2+3", "what?"], answers, strict=True):
        expected = _generate(model, tokenizer(question)["input_ids"], 2)
        assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip()
    with pytest.raises(ValueError, match="BloomForCausalLM takes no `position_ids`"):
        _decoder(model, every_block=True)


def test_with_the_adapter_disabled_the_base_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=2, r=0)  # blocks alone make the difference
    expected = _generate(model, tokenizer("2+3")["input_ids"], num_blocks=0)
    with model.disable_adapter():
        (answer,) = answer_questions(model, tokenizer, ["2+3"], templates=PLAIN, max_new_tokens=4)
    assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_bad_calls_are_named() -> None:
    model = build_rim(base=build_base("gpt2", n_positions=24), num_blocks=2)
    with pytest.raises(ValueError, match=r"prompts\[2\]: prompt \(14 tokens\), blocks \(8\) and answer \(4\)"):
        _decoder(model)(PROMPTS)
    for prompts in ([], [[5], []]):
        with pytest.raises(ValueError, match="prompts: must be at least one, each of at least one token"):
            _decoder(model)(prompts)
    with pytest.raises(ValueError, match="num_blocks: reading blocks out needs at least one, got 0"):
        _decoder(model, num_blocks=0, every_block=True)
    with pytest.raises(ValueError, match="batch_size: must be an integer of at least 1, got 0"):
        _decoder(model, batch_size=0)
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="needs a mask per query"):
        _decoder(model, every_block=True)
    _decoder(model)
