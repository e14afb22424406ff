"""``generate`` against a reference built by hand: blocks appended as ids, one plain forward pass a token, no cache."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from rim_peft.inference.decoding import BlockDecoder
from rim_peft.inference.greedy import generate_greedily
from rim_peft.tuner.bases import CACHE
from tests.conftest import ARCHITECTURES, EOS_ID, PAD_ID, VOCAB_SIZE, MakeBase, MakeRim, build_base, build_rim

Processor = Callable[[Tensor, Tensor], Tensor]
NO_EOS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": PAD_ID}
QUESTIONS = ["What is one and two?", "Who?"]


def next_logits(model: Any, prompt: Tensor, answer: Tensor, num_blocks: int | None = None) -> Tensor:
    """Logits after prompt (S), blocks and answer (T) of one unpadded row, (V)."""
    config = model.peft_config[model.active_adapter]
    block_ids = config.block_tokens.ids(config.num_blocks if num_blocks is None else num_blocks)
    row = torch.cat([prompt, torch.tensor(block_ids, dtype=torch.long), answer])
    with torch.no_grad():
        logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0, -1].float()
    return logits


def greedy(model: Any, prompt: Tensor, *, steps: int = 8, processor: Processor | None = None, **kwargs: Any) -> Tensor:
    """The answer (steps) that greedy search must give; ``processor`` maps (ids without memory, logits) to logits."""
    answer = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        logits = next_logits(model, prompt, answer, **kwargs)
        if processor is not None:
            logits = processor(torch.cat([prompt, answer]), logits)
        answer = torch.cat([answer, logits.argmax()[None]])
    return answer


def tokenize(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, return_tensors="pt", padding=True)


def rows(tokenizer: Any, texts: list[str]) -> list[Tensor]:
    return [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]


def answers(output: Tensor, inputs: Any) -> Tensor:
    torch.testing.assert_close(output[:, : inputs.input_ids.shape[1]], inputs.input_ids)
    return output[:, inputs.input_ids.shape[1] :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 20},
        {"num_blocks": 5},
        {"num_blocks": 0},
    ],
    ids=str,
)
def test_greedy_search_of_padded_batches(
    make_rim: MakeRim, tokenizer: Any, architecture: str, options: dict[str, Any]
) -> None:
    model = make_rim(architecture)
    inputs = tokenize(tokenizer, QUESTIONS)
    output = model.generate(**inputs, max_new_tokens=8, **NO_EOS, **options)
    for answer, prompt in zip(answers(output, inputs), rows(tokenizer, QUESTIONS), strict=True):
        torch.testing.assert_close(answer, greedy(model, prompt, num_blocks=options.get("num_blocks")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_without_blocks_and_a_disabled_one_are_the_base(
    make_rim: MakeRim, make_base: MakeBase, tokenizer: Any, architecture: str
) -> None:
    inputs = tokenize(tokenizer, QUESTIONS)
    expected = make_base(architecture).generate(**inputs, max_new_tokens=8)
    torch.testing.assert_close(
        make_rim(architecture, fresh=True).generate(**inputs, max_new_tokens=8, num_blocks=0), expected
    )
    torch.testing.assert_close(
        make_rim(architecture, num_blocks=0, fresh=True).generate(**inputs, max_new_tokens=8), expected
    )
    model = make_rim(architecture)
    with model.disable_adapter():
        torch.testing.assert_close(model.generate(**inputs, max_new_tokens=8), expected)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=8), expected)


def test_static_caches_of_layers_with_attention_and_a_recurrent_part(make_rim: MakeRim, tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    mamba: dict[str, Any] = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    }
    config = FalconH1Config(**sizes, **mamba, vocab_size=VOCAB_SIZE, num_key_value_heads=2, initializer_range=0.3)
    model = make_rim(base=FalconH1ForCausalLM(config).eval())
    inputs = tokenize(tokenizer, QUESTIONS[:1])
    output = model.generate(**inputs, max_new_tokens=8, cache_implementation="static", **NO_EOS)
    torch.testing.assert_close(answers(output, inputs)[0], greedy(model, inputs.input_ids[0]))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_a_base_of_recurrent_layers_alone(make_rim: MakeRim, tokenizer: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3
    )
    model = make_rim(base=MambaForCausalLM(config).eval())
    inputs = tokenize(tokenizer, QUESTIONS[:1])
    output = model.generate(**inputs, max_new_tokens=8, **NO_EOS, **options)
    if options.get("num_beams"):
        expected = model.generate(**inputs, max_new_tokens=8, use_cache=False, **NO_EOS, **options)
        torch.testing.assert_close(output, expected)
    else:
        torch.testing.assert_close(answers(output, inputs)[0], greedy(model, inputs.input_ids[0]))


class CodeOfItsOwn(LlamaForCausalLM):
    """A base whose code knows only the cache's old name, and swallows other arguments, as that of many bases does."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        **unknown: Any,
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids, **given, **{CACHE: past_key_values})


def test_a_base_that_would_not_get_its_cache_is_refused(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim(base=CodeOfItsOwn(build_base().config).eval())
    inputs = tokenize(tokenizer, QUESTIONS[:1])
    expected = greedy(model, inputs.input_ids[0])
    output = model.generate(**inputs, max_new_tokens=8, use_cache=False, **NO_EOS)
    torch.testing.assert_close(answers(output, inputs)[0], expected)
    if CACHE == "past_key_values":
        output = model.generate(**inputs, max_new_tokens=8, **NO_EOS)
        torch.testing.assert_close(answers(output, inputs)[0], expected)
        return
    with pytest.raises(ValueError, match=r"model: must take its cache as 'cache', .* takes 'past_key_values'"):
        model.generate(**inputs, max_new_tokens=8, **NO_EOS)
    with pytest.raises(ValueError, match=r"CodeOfItsOwn takes no .*cache.*, which decoding with a cache needs"):
        BlockDecoder(model, eos_id=None, pad_id=PAD_ID, every_block=True)
    prompts = inputs.input_ids.tolist()
    with pytest.raises(ValueError, match="model: must take its cache as 'cache'"):
        generate_greedily(model.get_base_model(), prompts, eos_id=None, pad_id=PAD_ID, max_new_tokens=2)


def test_each_adapter_appends_its_own_blocks(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    model.add_adapter("other", type(model.peft_config["default"])(num_blocks=4, block_size=1, r=2))
    inputs = tokenize(tokenizer, QUESTIONS[:1])
    for name in ("other", "default"):
        model.set_adapter(name)
        model.eval()
        expected = greedy(model, inputs.input_ids[0])
        torch.testing.assert_close(answers(model.generate(**inputs, max_new_tokens=8, **NO_EOS), inputs)[0], expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_beam_search_finds_the_beams_of_the_reference(make_rim: MakeRim, tokenizer: Any, architecture: str) -> None:
    model = make_rim(architecture)
    inputs = tokenize(tokenizer, QUESTIONS)
    output = model.generate(
        **inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2, length_penalty=0.0, **NO_EOS
    )
    expected = []
    for prompt in rows(tokenizer, QUESTIONS):
        beams = [(0.0, torch.empty(0, dtype=torch.long))]
        for _ in range(3):
            grown = [
                (score + float(gain), torch.cat([answer, token[None]]))
                for score, answer in beams
                for gain, token in zip(*next_logits(model, prompt, answer).log_softmax(-1).topk(3), strict=True)
            ]
            beams = sorted(grown, key=lambda beam: -beam[0])[:3]
        expected += [answer for _, answer in beams[:2]]
    torch.testing.assert_close(
        answers(output, inputs.__class__({"input_ids": inputs.input_ids.repeat_interleave(2, 0)})),
        torch.stack(expected),
    )


def test_sampling_draws_from_the_references_distribution(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS[:1])
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 0.7, "num_return_sequences": 3, **NO_EOS}
    torch.manual_seed(5)
    output = model.generate(**inputs, max_new_tokens=5, **settings)
    torch.manual_seed(5)
    drawn = torch.empty(3, 0, dtype=torch.long)
    for _ in range(5):
        logits = torch.stack([next_logits(model, inputs.input_ids[0], answer) for answer in drawn])
        drawn = torch.cat([drawn, torch.multinomial((logits / 0.7).softmax(-1), 1)], dim=1)
    torch.testing.assert_close(output[:, inputs.input_ids.shape[1] :], drawn)


def repetition(ids: Tensor, logits: Tensor) -> Tensor:
    seen = logits[ids]
    return logits.scatter(0, ids, torch.where(seen < 0, seen * 1.7, seen / 1.7))


def no_repeat(ids: Tensor, logits: Tensor) -> Tensor:
    return logits.index_fill(0, ids, -torch.inf)  # single tokens of prompt and answer are banned


def encoder_repetition(prompt: Tensor) -> Processor:
    def process(_: Tensor, logits: Tensor) -> Tensor:
        seen = logits[prompt] * torch.where(logits[prompt] < 0, 1 / 1.7, 1.7)
        return logits.scatter(0, prompt, seen)

    return process


class ForbidSeen(LogitsProcessor):
    """A caller's own processor, which gathers by id and notes the widths that it saw."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.widths.append(input_ids.shape[1])
        return scores.scatter(1, input_ids, -torch.inf)


def test_processors_see_prompt_and_answer_and_no_memory(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS[:1])
    prompt = inputs.input_ids[0]
    own = ForbidSeen()
    cases: list[tuple[dict[str, Any], Processor]] = [
        ({"repetition_penalty": 1.7}, repetition),
        ({"no_repeat_ngram_size": 1}, no_repeat),
        ({"encoder_no_repeat_ngram_size": 1}, lambda _, logits: no_repeat(prompt, logits)),
        ({"encoder_repetition_penalty": 1.7}, encoder_repetition(prompt)),
        ({"logits_processor": LogitsProcessorList([own])}, no_repeat),
    ]
    plain = greedy(model, prompt)
    for settings, processor in cases:
        output = model.generate(**inputs, max_new_tokens=8, **NO_EOS, **settings)
        expected = greedy(model, prompt, processor=processor)
        torch.testing.assert_close(answers(output, inputs)[0], expected, msg=str(settings))
        assert not torch.equal(expected, plain) or "encoder" in str(settings)
    assert own.widths == list(range(len(prompt), len(prompt) + 8))


class StopAtWidth(StoppingCriteria):
    """As in lm-evaluation-harness: looks at what follows the prompt's original length."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        answer = input_ids[:, self.prompt_length :]
        return torch.full((len(input_ids),), answer.shape[1] == 4)


def test_stopping_criteria_and_lengths_do_not_count_memory(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS)
    length = inputs.input_ids.shape[1]
    full = model.generate(**inputs, max_new_tokens=9, **NO_EOS)

    def generated(**settings: Any) -> Tensor:
        output: Tensor = model.generate(**inputs, **{**NO_EOS, **settings})
        return output

    criteria = StoppingCriteriaList([StopAtWidth(length)])
    torch.testing.assert_close(generated(max_length=length + 50, stopping_criteria=criteria), full[:, : length + 4])
    torch.testing.assert_close(generated(max_length=length + 6), full[:, : length + 6])
    torch.testing.assert_close(
        generated(generation_config=GenerationConfig(max_length=length + 6, **NO_EOS)), full[:, : length + 6]
    )
    assert generated().shape[1] == length + 20  # the default number of new tokens

    first = int(full[0, length])  # as end token it stops row 0 at once, unless a minimum length forbids that
    assert (generated(max_new_tokens=9, eos_token_id=first)[0, length:] == first).sum() == 1
    assert first not in generated(max_new_tokens=9, eos_token_id=first, min_length=length + 5)[0, length : length + 5]
    assert first not in generated(max_new_tokens=9, eos_token_id=first, min_new_tokens=5)[0, length : length + 5]


def test_stop_strings(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS[:1])
    full = answers(model.generate(**inputs, max_new_tokens=20, **NO_EOS), inputs)[0]
    position = next(
        i
        for i, token in enumerate(full.tolist())
        if i > 2 and len(tokenizer.decode([token])) == 1 and token >= 6 and tokenizer.decode([token]) != "\ufffd"
    )
    output = model.generate(
        **inputs,
        max_new_tokens=20,
        stop_strings=tokenizer.decode(full[position : position + 1]),
        tokenizer=tokenizer,
        **NO_EOS,
    )
    first = full.tolist().index(int(full[position]))
    torch.testing.assert_close(answers(output, inputs)[0], full[: first + 1])


def test_end_tokens_and_padding_of_finished_rows(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS)
    full = answers(model.generate(**inputs, max_new_tokens=6, **NO_EOS), inputs)
    end = int(full[0, 1])
    output = answers(model.generate(**inputs, max_new_tokens=6, eos_token_id=end, pad_token_id=PAD_ID), inputs)
    assert output[0, :2].tolist() == full[0, :2].tolist()
    assert set(output[0, 2:].tolist()) <= {PAD_ID}


def test_dictionary_outputs(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS)
    settings: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    output = model.generate(**inputs, max_new_tokens=4, **settings, **NO_EOS)
    length = inputs.input_ids.shape[1]
    torch.testing.assert_close(output.sequences, model.generate(**inputs, max_new_tokens=4, **NO_EOS))
    assert len(output.scores) == 4
    torch.testing.assert_close(
        output.scores[0][1], next_logits(model, rows(tokenizer, QUESTIONS)[1], torch.empty(0, dtype=torch.long))
    )
    assert output.hidden_states[0][-1].shape[1] == length + 8  # two blocks of four tokens
    assert output.past_key_values.get_seq_length() == length + 8 + 3
    transition = model.get_base_model().compute_transition_scores(output.sequences, output.scores)
    assert transition.shape == (2, 4)


def test_streamers_see_prompt_then_answer(make_rim: MakeRim, tokenizer: Any) -> None:
    class Recorder(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer)
            self.ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    inputs = tokenize(tokenizer, QUESTIONS[:1])
    recorder = Recorder()
    output = make_rim().generate(**inputs, max_new_tokens=5, streamer=recorder, **NO_EOS)
    assert recorder.ids == [*output[0].tolist(), -1]


def test_pipelines(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    generator: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    inputs = tokenize(tokenizer, QUESTIONS)
    texts = tokenizer.batch_decode(answers(model.generate(**inputs, **settings), inputs), skip_special_tokens=True)
    results = generator(QUESTIONS, batch_size=2, return_full_text=False, **settings)
    assert [result[0]["generated_text"] for result in results] == texts
    full = generator(QUESTIONS, **settings)
    assert [result[0]["generated_text"] for result in full] == [
        q + text for q, text in zip(QUESTIONS, texts, strict=True)
    ]
    chat = [{"role": "user", "content": "Who?"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(answers(model.generate(**rendered, **settings), rendered)[0], skip_special_tokens=True)
    reply = generator(chat, **settings)[0]["generated_text"]
    assert reply[-1] == {"role": "assistant", "content": text}


def test_prompts_that_hold_their_blocks_get_no_more(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS)
    expected = answers(
        model.generate(**inputs, max_new_tokens=5, repetition_penalty=1.5, num_blocks=3, **NO_EOS), inputs
    )
    blocks = torch.tensor(model.peft_config["default"].block_tokens.ids(3)).expand(2, -1)
    held = inputs.__class__(
        {
            "input_ids": torch.cat([inputs.input_ids, blocks], 1),
            "attention_mask": torch.cat([inputs.attention_mask, torch.ones_like(blocks)], 1),
        }
    )
    output = model.generate(**held, max_new_tokens=5, repetition_penalty=1.5, **NO_EOS)
    torch.testing.assert_close(answers(output, held), expected)
    dictionary = model.generate(
        **held, max_new_tokens=5, repetition_penalty=1.5, return_dict_in_generate=True, **NO_EOS
    )
    torch.testing.assert_close(dictionary.sequences, output)
    with pytest.raises(
        ValueError, match=r"input_ids: memory ids .* must be the same blocks at the end of every prompt"
    ):
        model.generate(held.input_ids.flip(1), max_new_tokens=5)


def test_positions_given_by_the_caller_are_continued(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS)
    expected = model.generate(**inputs, max_new_tokens=5, **NO_EOS)
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model.generate(**inputs, position_ids=positions, max_new_tokens=5, **NO_EOS), expected)


def test_a_call_leaves_no_trace_on_the_base(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    base = model.get_base_model()
    before = set(vars(base))
    model.generate(**tokenize(tokenizer, QUESTIONS), max_new_tokens=2)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(torch.tensor([[5, 6], [7, PAD_ID]]), attention_mask=torch.tensor([[1, 1], [1, 0]]))
    assert set(vars(base)) - before <= {"generation_config", "_previous_max_cache_length"}
    assert "prepare_inputs_for_generation" not in vars(base)


def test_the_base_generates_with_blocks_where_peft_hands_it_out(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    inputs = tokenize(tokenizer, QUESTIONS)
    expected = model.generate(**inputs, max_new_tokens=5)
    torch.testing.assert_close(model.get_base_model().generate(**inputs, max_new_tokens=5), expected)
    torch.testing.assert_close(
        model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=5), expected
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": -1}, "num_blocks: must be an integer of at least 0, got -1"),
        ({"prompt_lookup_num_tokens": 3}, "decoding: .* got 'assisted_generation'"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "decoding: .* got 'contrastive_search'"),
        ({"num_beams": 4, "num_beam_groups": 2}, "decoding: .* got 'group_beam_search'"),
        ({"custom_generate": "some/repository"}, "custom_generate: .* got 'some/repository'"),
        ({"cache_implementation": "paged"}, "cache_implementation: .* got 'paged'"),
        ({"token_healing": True}, "token_healing: .* got True"),
        ({"guidance_scale": 1.5}, "guidance_scale: .* got 1.5"),
        ({"guidance_scale": 0}, "guidance_scale: .* got 0"),
        ({"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[20]])}, "guidance_scale: .* got 1.5"),
        ({"generation_config": GenerationConfig(guidance_scale=2.0)}, "guidance_scale: .* got 2.0"),
        ({"assistant_early_exit": 1}, "decoding: .* got 'assisted_generation'"),
        ({"force_words_ids": [[30]], "num_beams": 2}, "decoding: .* got 'constrained_beam_search'"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"attention_mask: must be \(B, S\), .* got shape \(1, 1, 3, 3\)"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask: must .* \(1, 3\) ids, .* got shape \(1, 2\)"),
        ({"num_blocks": 128}, r"input_ids: prompt \(3 tokens\) and memory \(512\) must leave room .* 512 positions"),
    ],
)
def test_other_ways_to_decode_are_refused(make_rim: MakeRim, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rim().generate(torch.tensor([[20, 30, 40]]), max_new_tokens=2, **settings)


def test_inputs_that_blocks_cannot_follow_are_refused(make_rim: MakeRim, tokenizer: Any) -> None:
    model = make_rim()
    prompt = torch.tensor([[20, 30, 40]])
    with pytest.raises(ValueError, match=r"input_ids: must be given, .* got inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"input_ids: must be given, .* got no prompt"):
        model.generate(max_new_tokens=2)
    with pytest.raises(ValueError, match=r"decoding: .* got 'assisted_generation'"):
        model.generate(prompt, assistant_model=model.get_base_model(), max_new_tokens=2)
    cache = model.generate(prompt, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values: must be empty, got \d+ tokens"):
        model.generate(torch.tensor([[20, 30, 40, 50, 60]]), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="attention_mask: prompts must be padded on the left"):
        model.generate(torch.tensor([[20, 30], [40, PAD_ID]]), max_new_tokens=2)  # the mask is inferred
    with pytest.raises(ValueError, match="generate_batch: "):
        model.generate_batch([[20, 30]])
    assert EOS_ID < VOCAB_SIZE


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "gemma3"])
def test_rows_written_into_a_merged_base_give_the_same_answer(make_rim: MakeRim, architecture: str) -> None:
    model = make_rim(architecture)
    prompt = torch.tensor([[20, 30, 40]])
    expected = model.generate(prompt, max_new_tokens=6, **NO_EOS)[:, 3:]
    rows_of_memory = model.base_model.memory.rows("default").detach()
    ids = model.peft_config["default"].block_tokens.ids(2)
    merged = model.merge_and_unload()
    merged.resize_token_embeddings(VOCAB_SIZE + 3, mean_resizing=False)
    with torch.no_grad():
        merged.get_input_embeddings().weight[-3:] = rows_of_memory
    never = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]  # a tied head could emit them
    output = merged.generate(
        torch.cat([prompt, torch.tensor([ids])], dim=1), max_new_tokens=6, suppress_tokens=never, **NO_EOS
    )
    torch.testing.assert_close(output[:, 3 + len(ids) :], expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_calls_from_several_threads_do_not_meet(architecture: str) -> None:
    model = build_rim(architecture, num_blocks=4)
    prompts = [torch.randint(6, 200, (1, length)) for length in (5, 9, 14, 7)]

    def generate(prompt: torch.Tensor) -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=12, eos_token_id=None, do_sample=False)

    expected = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(generate, prompts))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


MEMORY = VOCAB_SIZE  # the id of <b>, which is any id of padding where a tokenizer has more tokens than the base


@pytest.mark.parametrize(
    "options", [{}, {"insertion_layer": 1, "bidirectional_blocks": True}], ids=["plain", "variants"]
)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_masked_places_hold_no_blocks(make_rim: MakeRim, options: dict[str, Any], settings: dict[str, Any]) -> None:
    model = make_rim(**options)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    prompts = torch.tensor([[PAD_ID, PAD_ID, 20, 30, 40], [20, 30, 40, 50, 60]])
    expected = model.generate(prompts, attention_mask=mask, max_new_tokens=4, **settings, **NO_EOS)
    odd = torch.where(mask == 0, MEMORY + 1, prompts)
    found = model.generate(odd, attention_mask=mask, max_new_tokens=4, **settings, **NO_EOS)
    torch.testing.assert_close(found[:, 5:], expected[:, 5:])
    torch.testing.assert_close(found[:: len(found) // 2, :5], odd)  # as the caller gave them
    with torch.no_grad():
        logits = [model(input_ids=ids, attention_mask=mask).logits[mask == 1] for ids in (prompts, odd)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_masked_places_hold_no_blocks_in_mixed_batches(make_rim: MakeRim) -> None:
    model = make_rim()
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    prompts = torch.tensor([[PAD_ID, PAD_ID, 20, 30, 40], [PAD_ID, 30, 40, 50, 60]])
    options = {"attention_mask": mask, "max_new_tokens": 4, "adapter_names": ["default", "__base__"], **NO_EOS}
    found, expected = (model.generate(ids, **options) for ids in (torch.where(mask == 0, MEMORY, prompts), prompts))
    torch.testing.assert_close(found[:, 5:], expected[:, 5:])


def test_masked_places_on_the_right_are_padding_on_the_right(make_rim: MakeRim) -> None:
    with pytest.raises(ValueError, match="attention_mask: prompts must be padded on the left"):
        make_rim().generate(
            torch.tensor([[5, 6, 7, MEMORY, MEMORY]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]), max_new_tokens=2
        )
    with pytest.raises(ValueError, match=rf"pad_token_id: must be below .* of {MEMORY}, .* got {MEMORY}"):
        make_rim().generate(torch.tensor([[5, 6, MEMORY]]), pad_token_id=MEMORY, max_new_tokens=2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"input_ids": torch.zeros(0, 3, dtype=torch.long)},
            r"input_ids: .* at least one prompt .* got shape \(0, 3\)",
        ),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids: .* at least one token, got shape \(2, 0\)"),
        ({"input_ids": torch.tensor([5, 6])}, r"input_ids: must be a \(B, S\) tensor .* got shape \(2,\)"),
        ({"input_ids": [[5, 6]]}, r"input_ids: must be a \(B, S\) tensor .* got list"),
        (
            {"input_ids": torch.tensor([[5, 6], [0, 0]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
            "attention_mask: must keep a token of each prompt, got row 1 of 2 completely masked",
        ),
        (
            {"input_ids": torch.tensor([[MEMORY, MEMORY + 2]])},
            "input_ids: must hold a prompt before memory ids .* got 2",
        ),
    ],
)
def test_empty_prompts_are_refused(make_rim: MakeRim, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rim().generate(**inputs, max_new_tokens=2)


NEUTRAL: dict[str, dict[str, Any]] = {
    "guidance of 1": {"guidance_scale": 1.0},
    "negative prompt that nothing reads": {"negative_prompt_ids": torch.tensor([[20]])},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "an empty cache": {CACHE: DynamicCache()},
    "no cache": {"use_cache": False},
    "synchronised processes": {"synced_gpus": False},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "a processor that changes nothing": {"logits_processor": LogitsProcessorList([lambda ids, scores: scores])},
    "any token allowed": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(VOCAB_SIZE))},
    "a limit of length": {"max_new_tokens": None, "max_length": 8},
    "more than is reached": {"max_time": 600.0},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_options_that_change_nothing_change_nothing(make_rim: MakeRim, name: str) -> None:
    model = make_rim()
    prompt = torch.tensor([[20, 30, 40, 50]])
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False, **NO_EOS)
    options = {"max_new_tokens": 4, "do_sample": False, **NO_EOS, **NEUTRAL[name]}
    torch.testing.assert_close(model.generate(prompt, **options), expected)


@pytest.mark.parametrize("ids", [[VOCAB_SIZE], [VOCAB_SIZE + 3], [VOCAB_SIZE, VOCAB_SIZE + 1]])
def test_ids_of_a_larger_tokenizer_are_no_blocks(make_rim: MakeRim, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"input_ids: must be ids below {VOCAB_SIZE}, .* got \[{ids[0]}.*resize"):
        make_rim().generate(torch.tensor([[5, 6, *ids]]), max_new_tokens=2)
