import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rim_peft import RiMConfig, RiMModel
from rim_peft.tuner.memory_embedding import MemoryEmbedding
from tests.conftest import ARCHITECTURES, VOCAB_SIZE, MakeBase, MakeRim, randomize_lora

PROMPT = torch.tensor([[20, 30, 40, 50]])
MEMORY = torch.tensor([[20, 30, VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE + 2]])


def logits(model: nn.Module, ids: Tensor = PROMPT) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attaching_trains_rows_and_lora_and_nothing_else(make_rim: MakeRim, architecture: str) -> None:
    model: Any = make_rim(architecture, fresh=True)
    assert type(model.base_model) is RiMModel
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(name.endswith("lora_rim_memory.default.weight") for name in trainable) == 1
    assert all(".lora_A." in name or ".lora_B." in name or "rim_memory" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    assert model.peft_config["default"].first_memory_id == VOCAB_SIZE
    model(input_ids=MEMORY).logits.sum().backward()
    gradient = model.base_model.memory.rows("default").grad
    assert gradient is not None
    assert bool((gradient.abs().sum(1) > 0).all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_or_disabled_adapter_equals_the_base(make_base: MakeBase, make_rim: MakeRim, architecture: str) -> None:
    expected = logits(make_base(architecture))
    torch.testing.assert_close(logits(make_rim(architecture, fresh=True)), expected)
    trained = make_rim(architecture)
    assert not torch.allclose(logits(trained), expected)
    with trained.disable_adapter():
        torch.testing.assert_close(logits(trained), expected, atol=0, rtol=0)
        with pytest.raises(ValueError, match="need an enabled RiM adapter"):
            logits(trained, MEMORY)


def test_rank_zero_trains_the_rows_alone(make_rim: MakeRim, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_rim(r=0)
    assert model.get_nb_trainable_parameters()[0] == 3 * 32
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    model.print_trainable_parameters()
    assert "trainable params: 96 " in capsys.readouterr().out


def test_status_counts_rows_and_lora_alike(make_rim: MakeRim) -> None:
    model = make_rim()
    model.add_adapter("other", RiMConfig(num_blocks=1, r=2))
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_adapters_keep_their_rows_blocks_and_lora_apart(make_rim: MakeRim) -> None:
    model = make_rim()
    first = logits(model, MEMORY)
    model.add_adapter("other", RiMConfig(num_blocks=5, block_size=1, r=2))
    torch.testing.assert_close(logits(model, MEMORY), first, atol=0, rtol=0)
    model.set_adapter("other")
    model.eval()
    assert not torch.allclose(logits(model, MEMORY), first)
    assert model.peft_config["other"].block_tokens.ids(1) == [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".other." in name for name in trainable)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, MEMORY), first, atol=0, rtol=0)
    model.delete_adapter("other")
    assert list(model.base_model.memory.lora_rim_memory) == ["default"]
    torch.testing.assert_close(logits(model, MEMORY), first, atol=0, rtol=0)


def test_deleting_the_last_adapter_leaves_the_base(make_base: MakeBase, make_rim: MakeRim) -> None:
    model = make_rim()
    model.delete_adapter("default")
    base = model.base_model.model
    torch.testing.assert_close(logits(base), logits(make_base()), atol=0, rtol=0)
    expected = make_base().generate(PROMPT, max_new_tokens=3)
    torch.testing.assert_close(base.generate(PROMPT, max_new_tokens=3), expected)


def test_deleting_the_active_adapter_activates_the_same_one_in_all_layers(make_rim: MakeRim) -> None:
    model = make_rim()
    model.add_adapter("attention", RiMConfig(num_blocks=2, r=4, target_modules=["q_proj"]))
    model.add_adapter("whole", RiMConfig(num_blocks=2, r=4))
    randomize_lora(model)
    model.set_adapter("attention")
    expected = logits(model.eval(), MEMORY)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapter == "attention"
    torch.testing.assert_close(logits(model.eval(), MEMORY), expected, atol=0, rtol=0)


def test_a_replaced_input_embedding_is_named(make_rim: MakeRim) -> None:
    model = make_rim()
    model.get_base_model().set_input_embeddings(nn.Embedding(VOCAB_SIZE, 32))
    with pytest.raises(ValueError, match="model: must keep the input embedding that the adapter wraps, got Embedding"):
        model.generate(PROMPT, max_new_tokens=2)


def test_a_rank_zero_adapter_joins_one_with_lora(make_rim: MakeRim) -> None:
    model = make_rim()
    model.add_adapter("memory_only", RiMConfig(r=0))
    model.set_adapter("memory_only")
    with model.disable_adapter():
        expected = logits(model)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_merging_folds_lora_and_drops_the_memory(make_rim: MakeRim, architecture: str) -> None:
    model = make_rim(architecture)
    expected = logits(model)
    with pytest.warns(UserWarning, match="Merging folds LoRA into the base and drops the memory rows"):
        merged = model.merge_and_unload()
    assert not any(isinstance(module, (MemoryEmbedding, LoraLayer)) for module in merged.modules())
    assert merged.get_input_embeddings().weight.shape[0] == VOCAB_SIZE
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)  # another order of summation
    assert "generate" not in vars(merged)
    with pytest.raises(IndexError):
        logits(merged, MEMORY)


def test_a_merge_without_room_for_biases_is_refused_before_the_first_layer(make_rim: MakeRim) -> None:
    """The first layers of Qwen 2 have biases, so PEFT merges them, and is at the fourth when it notices."""
    model = make_rim("qwen2", lora_bias=True)
    prompt = MEMORY[:, :2]
    expected = model.generate(prompt, max_new_tokens=4, num_blocks=1)
    refused = r"lora_bias: must be False .* such as model\.layers\.0\.self_attn\.o_proj, got True"
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=refused):
            merge()
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    torch.testing.assert_close(model.generate(prompt, max_new_tokens=4, num_blocks=1), expected)


@pytest.mark.parametrize("options", [{}, {"insertion_layer": 1}], ids=str)
def test_a_safe_merge_that_was_refused_leaves_the_blocks(make_rim: MakeRim, options: dict[str, Any]) -> None:
    model = make_rim(target_modules=["q_proj"], layers_to_transform=[0], **options)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    prompt, matrix = MEMORY[:, :2], layer.lora_B["default"].weight
    kept, expected = matrix.detach().clone(), model.generate(prompt, max_new_tokens=4, num_blocks=1)
    with torch.no_grad():
        matrix.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"safe_merge: the adapter's weights must be finite, got .*lora_B\.default"):
        model.merge_and_unload(safe_merge=True)
    for merge in (model.merge_and_unload, model.merge_adapter):  # PEFT's own words, which its users match
        with pytest.raises(
            ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
        ):
            merge(safe_merge=True)
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    with torch.no_grad():
        matrix.copy_(kept)
    torch.testing.assert_close(model.generate(prompt, max_new_tokens=4, num_blocks=1), expected)


def test_merging_in_place_keeps_the_memory_and_is_undone(make_rim: MakeRim) -> None:
    model = make_rim()
    expected = logits(model, MEMORY)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, MEMORY), expected, atol=1e-4, rtol=1e-4)  # another order of summation
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, MEMORY), expected, atol=1e-4, rtol=1e-4)  # rounding of merge and back


def test_the_active_adapter_is_merged_with_others(make_rim: MakeRim) -> None:
    model = make_rim()
    model.add_adapter("other", RiMConfig(num_blocks=3, r=4))
    randomize_lora(model)
    with pytest.raises(ValueError, match=r"adapter_names: must hold the active adapter, 'default', got \['other'\]"):
        model.merge_adapter(adapter_names=["other"])
    assert model.get_model_status().merged_adapters == []
    model.set_adapter("other")
    expected = logits(model.eval(), MEMORY)
    model.merge_adapter(adapter_names=["other"])
    torch.testing.assert_close(logits(model, MEMORY), expected, atol=1e-4, rtol=1e-4)  # another order of summation


def test_unloading_gives_the_base_back(make_base: MakeBase, make_rim: MakeRim) -> None:
    base = make_rim("llama_tied").unload()
    assert isinstance(base, PreTrainedModel)
    torch.testing.assert_close(logits(base), logits(make_base("llama_tied")), atol=0, rtol=0)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    again = get_peft_model(base, RiMConfig(num_blocks=1, r=2))
    assert logits(again, MEMORY).shape == (1, 6, VOCAB_SIZE)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"r": 0}])
def test_gradient_checkpointing_gives_the_same_gradients(
    make_rim: MakeRim, options: dict[str, Any], use_reentrant: bool
) -> None:
    def gradients(*, checkpointing: bool) -> Iterator[Any]:
        model = make_rim(**options).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(input_ids=MEMORY, labels=MEMORY.clamp(max=VOCAB_SIZE - 1)).loss.backward()
        return (parameter.grad for parameter in model.parameters() if parameter.requires_grad)

    for ours, plain in zip(gradients(checkpointing=True), gradients(checkpointing=False), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_copies_and_pickles_generate_on_their_own(make_rim: MakeRim, architecture: str) -> None:
    model = make_rim(architecture)
    expected = model.generate(PROMPT, max_new_tokens=4)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert other.get_base_model().generate.model is other.get_base_model()
        torch.testing.assert_close(other.generate(PROMPT, max_new_tokens=4), expected)


def test_dropout_can_be_changed_from_and_to_zero(make_rim: MakeRim) -> None:
    model = make_rim(lora_dropout=0.0)
    tuner = model.base_model
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    tuner.set_dropout(0.25)
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert layer.lora_dropout["default"].p == model.peft_config["default"].lora_dropout == 0.25
    torch.testing.assert_close(logits(model), logits(model), atol=0, rtol=0)  # evaluation mode is kept
    model.train()
    assert not torch.equal(logits(model), logits(model))
    tuner.set_dropout(0.0, "default")
    torch.testing.assert_close(logits(model), logits(model), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"p: must be in \[0, 1\), got 1"):
        tuner.set_dropout(1)
    with pytest.raises(ValueError, match=r"adapter_name: must be one of \['default'\], got 'none'"):
        tuner.set_dropout(0.1, "none")


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "target_modules: must not hold the input embedding"),
        ("llama", {"target_modules": ".*embed_tokens"}, "target_modules: must not hold the input embedding"),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}, "target_modules: must not hold the input embedding"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, "modules_to_save: must not hold the input embedding"),
        ("llama", {"modules_to_save": ["model.embed_tokens"]}, "modules_to_save: must not hold the input embedding"),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "target_modules: must not hold the output head"),
        ("llama", {"target_modules": ["query"]}, r"target_modules: must name layers .* matches none. Use 'all-linear'"),
        ("llama", {"first_memory_id": 90}, "first_memory_id: must be the number of rows .* 262, got 90"),
        ("llama", {"init_memory": [1, 262]}, "init_memory: token ids must be below the vocabulary's size 262"),
    ],
)
def test_options_that_do_not_fit_the_base_are_refused(
    make_rim: MakeRim, architecture: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_rim(architecture, **options)


def test_other_models_and_uses_are_refused(make_rim: MakeRim) -> None:
    with pytest.raises(ValueError, match="model: must be a transformers causal language model, got Linear"):
        get_peft_model(nn.Linear(2, 2), RiMConfig(r=2))
    model = make_rim()
    model.add_adapter("other", RiMConfig(r=2))
    with pytest.raises(ValueError, match="resize_token_embeddings: the vocabulary must keep its size"):
        model.resize_token_embeddings(300)
    with pytest.raises(TypeError, match="MemoryEmbedding"):  # transformers' own check
        model.get_base_model().resize_token_embeddings(300)
    with pytest.raises(ValueError, match="RiM has one active adapter at a time"):
        model.base_model.set_adapter(["default", "other"])


def test_attaching_to_a_model_without_weights(make_base: MakeBase) -> None:
    with torch.device("meta"):
        base = make_base()
    model = get_peft_model(base, RiMConfig(num_blocks=2, r=4))
    assert isinstance(model, PeftModel)
    assert model.get_nb_trainable_parameters()[0] > 0


def test_rank_patterns_dora_and_rslora_are_loras(make_rim: MakeRim) -> None:
    model = make_rim(rank_pattern={"q_proj": 2}, use_dora=True, use_rslora=True, target_modules=["q_proj", "v_proj"])
    randomize_lora(model)
    ranks = {
        name.rpartition(".")[2]: module.r["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert ranks == {"q_proj": 2, "v_proj": 4}
    assert logits(model, MEMORY).isfinite().all()
