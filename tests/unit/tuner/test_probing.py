"""What bases do, found out on small copies: are they causal, and do token ids matter by their embedding alone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rim_peft import RiMConfig
from rim_peft.tuner import small_copy as probing
from rim_peft.tuner.small_copy import Behaviour, observe
from tests.conftest import ARCHITECTURES, build_base

ENCODERS = ("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie", "rembert", "roformer")
LIKE_OTHERS = Behaviour(is_causal=True, reads_ids_once=True)

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PER_LAYER: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}


def build(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **options})).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoders_are_as_they_should_be(architecture: str) -> None:
    assert observe(build_base(architecture)) == LIKE_OTHERS


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_is_refused_unless_it_is_a_decoder(model_type: str) -> None:
    with pytest.raises(ValueError, match=r"model: must be causal, got \w+ .* Set is_decoder=True"):
        get_peft_model(build(model_type), RiMConfig(r=2))
    get_peft_model(build(model_type, is_decoder=True), RiMConfig(r=2))


def test_a_decoder_made_bidirectional_by_its_config_is_refused() -> None:
    base = build("gemma3_text", num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="model: must be causal, got Gemma3ForCausalLM"):
        get_peft_model(base, RiMConfig(r=2))


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma3n_text"])
def test_a_second_look_up_of_ids_is_refused(model_type: str) -> None:
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **PER_LAYER))
    with pytest.raises(ValueError, match=r"model: must use token ids for its input embedding alone, got Gemma\dn?For"):
        get_peft_model(base, RiMConfig(r=2))


def test_without_the_second_look_up_the_base_is_taken() -> None:
    options = {**PER_LAYER, "hidden_size_per_layer_input": 0}
    get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **options)), RiMConfig(r=2))


def test_looking_leaves_random_state_and_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_known", {})
    base = build_base()
    base.forward = None  # the base itself is not run
    state = torch.get_rng_state()
    assert observe(base) == LIKE_OTHERS
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(probing, "on_small_copy", None)
    assert observe(base) == LIKE_OTHERS  # known by now


def test_a_large_base_without_weights_takes_no_longer() -> None:
    config = AutoConfig.for_model("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    started = time.process_time()
    assert observe(base) == LIKE_OTHERS
    assert time.process_time() - started < 2


def test_a_base_of_which_no_copy_can_be_made_is_left_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_known", {})
    monkeypatch.setattr(probing, "_MOST_PARAMETERS", 1)
    assert observe(build("bert")) is None
    get_peft_model(build("bert"), RiMConfig(r=2))


@pytest.mark.slow
def test_the_causal_models_of_transformers() -> None:
    """Most can be looked at with their config's defaults, and none but encoders and a few others are refused."""
    found = {name: observe_default(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    known = {name: behaviour for name, behaviour in found.items() if behaviour is not None}
    assert len(known) > 0.7 * len(found)
    assert {"llama", "mistral", "qwen3", "gpt2", "phi3", "deepseek_v3", "olmo2", "modernbert-decoder"} <= known.keys()
    encoders = {name for name, behaviour in known.items() if not behaviour.is_causal}
    assert encoders >= {name for name in ENCODERS if name in known}
    assert not [name for name in encoders if not ("bert" in name or name in NOT_CAUSAL)]
    assert {name for name, behaviour in known.items() if not behaviour.reads_ids_once} <= {
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
    }


NOT_CAUSAL = ("big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie", "roformer", "xlm", "xlnet")


def observe_default(name: str) -> Behaviour | None:
    class Known:
        """A model's class and config, without a model."""

    try:
        config = AutoConfig.for_model(name)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except Exception:
        return None
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    model: Any = object.__new__(model_class)
    vars(model)["config"] = config
    return observe(model)
