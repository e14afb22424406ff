"""Blocks that enter at a middle layer, and bidirectional ones, against a loop over the layers written out by hand.

The reference runs one sequence without padding, batch or cache. It calls each layer's ``forward`` itself, past all
hooks, with a dense mask made token by token, and puts the memory rows where they belong. Below the insertion layer
memory positions hold zeros, which no token may look at.
"""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from rim_peft import GroundingTrainer, RefinementTrainer, RiMConfig
from rim_peft.data.examples import Templates
from rim_peft.inference import BlockDecoder, read_blocks
from rim_peft.sequence import Layout, Sample, build_layout, keep_readouts, pack_rows
from rim_peft.training.losses import label_weights, readout_loss
from rim_peft.tuner import MemoryEmbedding
from rim_peft.tuner.bases import attention_masks
from tests.conftest import PAD_ID, build_base, build_rim
from tests.training import ROWS, assert_same_gradients, gradients, train_mode

NUM_LAYERS = 3
LAYERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": NUM_LAYERS},
    "gemma3": {
        "num_hidden_layers": NUM_LAYERS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
VARIANTS = [(layer, flag) for layer in range(NUM_LAYERS) for flag in (False, True) if layer > 0 or flag]
BOTH: dict[str, Any] = {"insertion_layer": 1, "bidirectional_blocks": True}
SAMPLES = [
    Sample([11, 12, 13, 14, 15], [[20, 21, 22], [23, 24], [25, 26, 27, 28]]),
    Sample([16, 17], [[30, 31], [32, 33, 34]]),
    Sample([8, 9, 10, 41, 42, 43, 44], [[35], [36], [37, 38], [39]]),
]
WEIGHTS = torch.tensor([[0.2, 0.5, 1.0, 0.0], [1.0, 0.3, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
PROMPTS = [sample.prompt for sample in SAMPLES]
NO_EOS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": PAD_ID, "do_sample": False}

every_base = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mistral"])
every_variant = pytest.mark.parametrize(
    ("attention", "layer", "bidirectional"),
    [*[("sdpa", *variant) for variant in VARIANTS], ("eager", 0, True), ("eager", 1, False), ("eager", 2, True)],
)


def build(architecture: str = "llama", *, attention: str = "sdpa", **options: Any) -> Any:
    overrides = LAYERS.get(architecture, {"num_hidden_layers": NUM_LAYERS})
    base = build_base(architecture, attn_implementation=attention, **overrides)
    return build_rim(architecture, base=base, **options)


def block_numbers(ids: list[int], first: int) -> tuple[int, ...]:
    """The block, from 1, that each token belongs to; 0 for none."""
    return tuple(sum(other == first for other in ids[: i + 1]) if token >= first else 0 for i, token in enumerate(ids))


@functools.cache
def reference_mask(blocks: tuple[int, ...], *, is_hidden: bool, bidirectional: bool, window: int | None) -> Tensor:
    """Who attends to whom in a layer, (1, 1, S, S) additive; ``is_hidden`` below the insertion layer."""
    mask = torch.full((len(blocks), len(blocks)), torch.finfo(torch.float32).min)
    for query in range(len(blocks)):
        for key in range(len(blocks)):
            allowed = key <= query and (window is None or query - key < window)
            if is_hidden:
                allowed = allowed and (blocks[key] == 0 or key == query)
            elif bidirectional:
                allowed = allowed or blocks[query] == blocks[key] > 0
            if allowed:
                mask[query, key] = 0.0
    return mask[None, None]


def reference_logits(model: PeftModel, ids: list[int]) -> Tensor:
    """Logits (S, V) after each of the tokens of one sequence, with the active adapter."""
    base: Any = model.get_base_model()
    memory = base.get_input_embeddings()
    config: Any = model.peft_config[model.active_adapter]
    first = memory.first_memory_id
    kinds = [max(token - first, -1) for token in ids]  # 0, 1, 2 for memory
    scale = getattr(memory.base_layer, "embed_scale", 1.0)
    rows = memory.rows(model.active_adapter) * scale
    is_memory = torch.tensor([kind >= 0 for kind in kinds])[None, :, None]
    inserted = rows[[max(kind, 0) for kind in kinds]][None]
    hidden = memory.base_layer(torch.tensor([[0 if token >= first else token for token in ids]]))
    hidden = torch.where(is_memory, torch.zeros_like(hidden), hidden)
    if config.insertion_layer == 0:
        hidden = torch.where(is_memory, inserted, hidden)
    positions = torch.arange(len(ids))[None]
    is_gpt2 = base.config.model_type == "gpt2"
    decoder = base.transformer if is_gpt2 else base.model
    layer_types = getattr(base.config, "layer_types", None) or ["full_attention"] * NUM_LAYERS
    if is_gpt2:
        hidden = hidden + decoder.wpe(positions)
    for index, layer in enumerate(decoder.h if is_gpt2 else decoder.layers):
        if index == config.insertion_layer > 0:
            hidden = torch.where(is_memory, inserted, hidden)
        has_window = layer_types[index] == "sliding_attention" or base.config.model_type == "mistral"
        window = base.config.sliding_window if has_window else None
        extra: dict[str, Any] = {}
        if base.config.model_type == "gemma3_text":
            extra["position_embeddings"] = decoder.rotary_emb(hidden, positions, layer_types[index])
        elif not is_gpt2:
            extra["position_embeddings"] = decoder.rotary_emb(hidden, positions)
        mask = reference_mask(
            block_numbers(ids, first),
            is_hidden=index < config.insertion_layer,
            bidirectional=config.bidirectional_blocks,
            window=window,
        )
        hidden = layer.forward(hidden, attention_mask=mask, **extra)
    hidden = decoder.ln_f(hidden) if is_gpt2 else decoder.norm(hidden)
    logits: Tensor = base.lm_head(hidden)[0]
    return logits


def reference_answer(model: Any, prompt: Any, *, num_blocks: int = 2, steps: int = 4) -> list[int]:
    """The greedy answer, one full pass a token."""
    ids = [*prompt, *model.peft_config[model.active_adapter].block_tokens.ids(num_blocks)]
    answer: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            answer.append(int(reference_logits(model, [*ids, *answer])[-1].argmax()))
    return answer


def reference_loss(model: Any, samples: list[Sample], all_weights: Any) -> Tensor:
    """The method's formula, one sequence ``x, m_<=k, readout_k`` at a time."""
    blocks = model.peft_config[model.active_adapter].block_tokens
    total = torch.zeros(())
    for sample, weights in zip(samples, all_weights, strict=True):
        for k, readout in enumerate(sample.readouts, start=1):
            trunk = [*sample.prompt, *blocks.ids(k)]
            log_probs = reference_logits(model, [*trunk, *readout])[len(trunk) - 1 : -1].log_softmax(-1)
            total = total - weights[k - 1] * log_probs[range(len(readout)), list(readout)].sum()
    return total / len(samples)


def layout_of(model: Any, samples: list[Sample], **options: Any) -> Layout:
    return build_layout(samples, model.peft_config[model.active_adapter].block_tokens, pad_id=PAD_ID, **options)


def one_pass_loss(model: Any, layout: Layout, weights: Tensor = WEIGHTS) -> Tensor:
    mask = attention_masks(model.config, layout, dtype=torch.float32)
    logits = model(input_ids=layout.input_ids, attention_mask=mask, position_ids=layout.position_ids).logits
    labels = layout.labels()
    log_probs = logits.flatten(0, 1)[labels.places].log_softmax(-1).gather(1, labels.token_ids[:, None])[:, 0]
    return readout_loss(log_probs, label_weights(weights, labels), num_samples=len(weights))


def generate(model: Any, prompts: Any, **options: Any) -> list[list[int]]:
    """The answers to prompts padded on the left."""
    rows = layout_of(model, [Sample(prompt, []) for prompt in prompts], padding_side="left")
    output = model.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        **{"max_new_tokens": 4, **NO_EOS, **options},
    )
    answers: list[list[int]] = output[:, rows.input_ids.shape[1] :].tolist()
    return answers


# Training


@every_base
@every_variant
def test_one_pass_equals_separate_sequences(architecture: str, attention: str, layer: int, bidirectional: bool) -> None:
    model = build(architecture, attention=attention, insertion_layer=layer, bidirectional_blocks=bidirectional)
    ours = one_pass_loss(model, layout_of(model, SAMPLES, padding_side="left" if bidirectional else "right"))
    assert_same_gradients(model, ours, reference_loss(model, SAMPLES, WEIGHTS))


@every_base
def test_packed_rows_without_some_readouts_equal_separate_sequences(architecture: str) -> None:
    model = build(architecture, **BOTH)
    weights = WEIGHTS * torch.tensor([0.0, 1.0, 1.0, 1.0])
    packed = pack_rows(keep_readouts(layout_of(model, SAMPLES), weights > 0), 80)
    assert len(packed.input_ids) == 1
    assert_same_gradients(model, one_pass_loss(model, packed, weights), reference_loss(model, SAMPLES, weights))


def test_the_proof_can_fail() -> None:
    """The reference under other options is far from the pass."""
    model = build(**BOTH)
    with torch.no_grad():
        found = one_pass_loss(model, layout_of(model, SAMPLES))
        for other in ({"insertion_layer": 0}, {"insertion_layer": 2}, {"bidirectional_blocks": False}):
            for name, value in {**BOTH, **other}.items():
                setattr(model.peft_config["default"], name, value)
            assert abs(found - reference_loss(model, SAMPLES, WEIGHTS)) > 0.1


@every_base
def test_what_memory_holds_below_the_insertion_layer_does_not_matter(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_forward = MemoryEmbedding.forward

    def noisy_forward(self: MemoryEmbedding, input_ids: Tensor) -> Tensor:
        embedded = plain_forward(self, input_ids)
        is_memory = (input_ids >= self.first_memory_id)[..., None]
        return torch.where(is_memory, torch.randn_like(embedded), embedded)

    for layer in range(NUM_LAYERS):
        monkeypatch.setattr(MemoryEmbedding, "forward", plain_forward)
        model = build(architecture, insertion_layer=layer, bidirectional_blocks=layer != 1)
        layout = layout_of(model, SAMPLES)
        with torch.no_grad():
            loss, answers = one_pass_loss(model, layout), generate(model, PROMPTS)
            monkeypatch.setattr(MemoryEmbedding, "forward", noisy_forward)
            noisy_loss, noisy_answers = one_pass_loss(model, layout), generate(model, PROMPTS)
        assert (torch.equal(noisy_loss, loss) and noisy_answers == answers) == (layer > 0)


@every_base
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_batch_equals_its_rows_alone(architecture: str, attention: str) -> None:
    model = build(architecture, attention=attention, **BOTH)
    with torch.no_grad():
        together = one_pass_loss(model, layout_of(model, SAMPLES))
        alone = [
            one_pass_loss(model, layout_of(model, [sample]), weights[None, : len(sample.readouts)])
            for sample, weights in zip(SAMPLES, WEIGHTS, strict=True)
        ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(architecture: str, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = train_mode(build(architecture, **BOTH))
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        # Two passes before the gradients of either: each layer is run again with its own pass's blocks.
        layouts = [layout_of(model, [sample]) for sample in SAMPLES[:2]]
        losses = [
            one_pass_loss(model, layout, weights[None]) for layout, weights in zip(layouts, WEIGHTS[:2], strict=True)
        ]
        found.append(gradients(model, torch.stack(losses).sum()))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("trainer_class", [GroundingTrainer, RefinementTrainer])
@pytest.mark.parametrize("options", [{}, {"pack_length": 64, "gradient_checkpointing": True}], ids=str)
def test_both_trainers_take_a_step_on_the_methods_loss(
    trainer_class: Any, options: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = build(num_blocks=3, **BOTH)
    settings: dict[str, Any] = {"gradient_checkpointing": False, "report_to": "none", "learning_rate": 1e-2}
    if trainer_class is GroundingTrainer:
        settings |= {"schedule": "uniform", "trailing_blocks": False}
    args = trainer_class.config_class(str(tmp_path), max_steps=1, **{**settings, **options})
    trainer = trainer_class(model, args, train_dataset=Dataset.from_list(ROWS[:3]), processing_class=tokenizer)
    rows = list(trainer.train_dataset)
    if trainer_class is GroundingTrainer:
        readouts = [[*row["step_ids"][1:], row["answer_ids"]] for row in rows]
        weights = [[1.0, 1.0, 1.0]] * 3
    else:
        readouts, weights = [[row["answer_ids"]] * 3 for row in rows], [[1 / 6, 2 / 6, 3 / 6]] * 3
    samples = [Sample(row["prompt_ids"], texts) for row, texts in zip(rows, readouts, strict=True)]
    assert_same_gradients(
        model, trainer.compute_loss(trainer.model, trainer.data_collator(rows)), reference_loss(model, samples, weights)
    )
    before = model.base_model.memory.rows("default").detach().clone()
    trainer.train()
    assert (model.base_model.memory.rows("default") - before).abs().max() > 1e-3


# Answers


@every_base
@every_variant
def test_generate_equals_full_passes_token_by_token(
    architecture: str, attention: str, layer: int, bidirectional: bool
) -> None:
    model = build(architecture, attention=attention, insertion_layer=layer, bidirectional_blocks=bidirectional)
    expected = [reference_answer(model, prompt) for prompt in PROMPTS]
    assert generate(model, PROMPTS) == expected
    assert generate(model, PROMPTS[:1]) == expected[:1]  # no padding: sdpa gets no mask


@every_base
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 10}, {"num_blocks": 5}, {"num_blocks": 0}],
    ids=str,
)
def test_generate_in_other_ways(architecture: str, options: dict[str, Any]) -> None:
    model = build(architecture, **BOTH)
    num_blocks = options.get("num_blocks", 2)
    expected = [reference_answer(model, prompt, num_blocks=num_blocks) for prompt in PROMPTS]
    assert generate(model, PROMPTS, **options) == expected


@every_base
def test_beam_search_finds_the_beams_of_the_reference(architecture: str) -> None:
    model = build(architecture, **BOTH)
    found = generate(model, PROMPTS[:2], max_new_tokens=3, num_beams=3, num_return_sequences=2, length_penalty=0.0)
    expected = []
    for prompt in PROMPTS[:2]:
        trunk = [*prompt, *model.peft_config["default"].block_tokens.ids(2)]
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(3):
            grown = []
            for score, answer in beams:
                with torch.no_grad():
                    best = reference_logits(model, [*trunk, *answer])[-1].log_softmax(-1).topk(3)
                gains = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                grown += [(score + gain, [*answer, token]) for gain, token in gains]
            beams = sorted(grown, key=lambda beam: -beam[0])[:3]
        expected += [answer for _, answer in beams[:2]]
    assert found == expected


def test_sampling_draws_the_same_with_and_without_a_cache() -> None:
    model = build(**BOTH)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(generate(model, PROMPTS, do_sample=True, top_k=0, num_return_sequences=2, use_cache=use_cache))
    assert drawn[0] == drawn[1]
    assert len({tuple(answer) for answer in drawn[0]}) > 3


@every_base
@pytest.mark.parametrize(("layer", "bidirectional"), [(0, True), (1, False), (2, True)])
def test_every_blocks_answer_equals_separate_generation(architecture: str, layer: int, bidirectional: bool) -> None:
    model = build(architecture, num_blocks=3, insertion_layer=layer, bidirectional_blocks=bidirectional)
    settings: dict[str, Any] = {"pad_id": PAD_ID, "max_new_tokens": 4}
    found = BlockDecoder(model, eos_id=None, every_block=True, **settings)(PROMPTS)
    separate = [generate(model, PROMPTS, num_blocks=k) for k in (1, 2, 3)]
    assert [list(answers) for answers in zip(*found.token_ids, strict=True)] == separate
    # Two rows end at once and leave the third alone on the cache.
    first, _, third = separate[-1]
    last = BlockDecoder(model, eos_id=first[0], **settings)([PROMPTS[0], PROMPTS[0], PROMPTS[2]])
    ended = third[: third.index(first[0]) + 1] if first[0] in third else third
    assert last.token_ids == [[first[:1]], [first[:1]], [ended]]


def test_readouts_have_the_references_log_probabilities(tokenizer: Any) -> None:
    model = build(num_blocks=3, **BOTH)
    blocks = model.peft_config["default"].block_tokens
    (readouts,) = read_blocks(model, tokenizer, ["2+3"], templates=Templates(prompt="{question}"), max_new_tokens=4)
    for readout in readouts:
        trunk = [*tokenizer("2+3").input_ids, *blocks.ids(readout.block)]
        with torch.no_grad():
            logits = reference_logits(model, [*trunk, *readout.token_ids])
        log_probs = logits[len(trunk) - 1 : -1].log_softmax(-1)
        expected = log_probs[range(len(readout.token_ids)), readout.token_ids]
        torch.testing.assert_close(torch.tensor(readout.token_log_probs), expected, atol=1e-4, rtol=1e-4)


@every_base
def test_a_callers_own_loop_on_a_cache(architecture: str) -> None:
    """Also one that the model makes itself, and one whose last tokens were taken back."""
    model = build(architecture, **BOTH)
    ids = [*PROMPTS[0], *model.peft_config["default"].block_tokens.ids(2), 50, 60]
    with torch.no_grad():
        expected = reference_logits(model, [*ids, 70, 80])
        output = model(torch.tensor([ids]), use_cache=True)
        torch.testing.assert_close(output.logits[0], expected[:-2], atol=1e-4, rtol=1e-4)
        cache = output.past_key_values
        two = model(torch.tensor([[70, 80]]), past_key_values=cache).logits[0]
        torch.testing.assert_close(two, expected[-2:], atol=1e-4, rtol=1e-4)
        if architecture in ("llama", "gpt2"):  # windows drop what would have to come back
            cache.crop(-2)
            again = model(torch.tensor([[70]]), past_key_values=copy.deepcopy(cache)).logits[0]
            torch.testing.assert_close(again, expected[-2:-1], atol=1e-4, rtol=1e-4)


def test_calls_from_several_threads_do_not_meet() -> None:
    model = build(num_blocks=4, **BOTH)
    expected = [generate(model, [prompt]) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda prompt: generate(model, [prompt]), PROMPTS)) == expected


# Adapters


def test_saving_loading_and_merging(tmp_path: Path) -> None:
    build_base(num_hidden_layers=NUM_LAYERS).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = build_rim(base=base, **BOTH)
    expected = generate(model, PROMPTS)
    model.save_pretrained(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    config = loaded.peft_config["default"]
    assert (config.insertion_layer, config.bidirectional_blocks) == (1, True)
    assert generate(loaded, PROMPTS) == expected
    # transformers' own loading makes no PeftModel.
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    prompt = torch.tensor([PROMPTS[0]])
    assert plain.generate(prompt, max_new_tokens=4, **NO_EOS)[0, len(PROMPTS[0]) :].tolist() == expected[0]
    loaded.merge_adapter()
    assert generate(loaded, PROMPTS) == expected
    loaded.unmerge_adapter()
    assert generate(copy.deepcopy(loaded), PROMPTS) == expected


def hooks_of(base: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in base.modules())


def test_a_disabled_adapter_is_the_base_and_an_unloaded_one_leaves_nothing() -> None:
    base = build_base(num_hidden_layers=NUM_LAYERS)
    attributes = set(vars(base))
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = base(prompt).logits
    model = build_rim(base=base, **BOTH)
    assert hooks_of(base) == 1 + NUM_LAYERS
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(prompt).logits, expected, atol=0, rtol=0)
        torch.testing.assert_close(model(inputs_embeds=base.model.embed_tokens(prompt)).logits, expected)
    assert model.unload() is base
    assert hooks_of(base) == 0
    assert set(vars(base)) - attributes <= {"peft_config", "_hf_peft_config_loaded"}


def test_default_options_install_nothing() -> None:
    assert hooks_of(build().get_base_model()) == 0
    assert hooks_of(build(insertion_layer=0, bidirectional_blocks=False).get_base_model()) == 0


def test_adapters_with_other_options_take_turns() -> None:
    model = build(**BOTH)
    for name, layer in {"late": 2, "plain": 0}.items():
        torch.manual_seed(2)
        model.add_adapter(name, RiMConfig(num_blocks=2, r=4, insertion_layer=layer))
    assert hooks_of(model.get_base_model()) == 1 + NUM_LAYERS
    seen = []
    for name in ("late", "default", "plain", "default"):
        model.set_adapter(name)
        seen.append([reference_answer(model, prompt) for prompt in PROMPTS])
        assert generate(model, PROMPTS) == seen[-1]
    assert seen[1] == seen[3]
    assert seen[0] != seen[1] != seen[2] != seen[0]
    model.delete_adapter("default")
    model.set_adapter("late")
    assert generate(model, PROMPTS) == seen[0]
    model.delete_adapter("late")
    assert hooks_of(model.get_base_model()) == 0
    model.set_adapter("plain")
    assert generate(model, PROMPTS) == seen[2]


# What is refused


def test_what_variants_cannot_do_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = build(**BOTH)
    both = "insertion_layer=1 and bidirectional_blocks=True"
    with pytest.raises(ValueError, match=f"cache_implementation: must be .* with {both}, got StaticCache of a fixed"):
        generate(model, PROMPTS, cache_implementation="static")
    with pytest.raises(ValueError, match=f"compiled: must be False with {both}, got True"):
        BlockDecoder(model, eos_id=None, pad_id=PAD_ID, compiled=True)
    args = GroundingTrainer.config_class(str(tmp_path), compile_layers=True, report_to="none")
    with pytest.raises(ValueError, match=f"compile_layers: must be False with {both}, got True"):
        GroundingTrainer(model, args, train_dataset=Dataset.from_list(ROWS[:3]), processing_class=tokenizer)
    with pytest.raises(ValueError, match=f"input_ids: must be given with {both}"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    cache = DynamicCache()
    with torch.no_grad(), model.disable_adapter():
        model(torch.tensor([[5, 6]]), past_key_values=cache, use_cache=True)
    with pytest.raises(
        ValueError, match=r"(cache|past_key_values): must hold tokens that this model computed, got 2 of which 0"
    ):
        model(torch.tensor([[7]]), past_key_values=cache)
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=f"attn_implementation: must be 'eager' or 'sdpa' with {both}"):
        generate(model, PROMPTS)
