"""Bases whose layers blocks can and cannot enter, and arguments however they are passed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from rim_peft import RiMConfig
from rim_peft.tuner.layers import Arguments, check_variants, find_layers, lowest_layers, parameter_names
from tests.conftest import ARCHITECTURES, build_base

NAMES = ["hidden_states", "past", "attention_mask"]


def test_arguments_are_found_and_replaced_where_they_stand() -> None:
    call = Arguments(NAMES, (1, None), {"attention_mask": 3, "more": 4})
    assert [call.get(name) for name in ("hidden_states", "past", "attention_mask", "more", "none")] == [
        1,
        None,
        3,
        4,
        None,
    ]
    assert call.get("past", "more") == 4
    for name in ("hidden_states", "attention_mask", "none"):
        call.put(name, 9)
    assert (call.args, call.kwargs) == ([9, None], {"attention_mask": 9, "more": 4, "none": 9})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_found(architecture: str) -> None:
    base = build_base(architecture)
    decoder, layers = find_layers(base)
    assert decoder is base.base_model
    assert len(layers) == 2
    assert {"hidden_states", "attention_mask"} <= set(parameter_names(layers[0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_lowest_layers_alone_are_a_shallower_model(architecture: str) -> None:
    ids = torch.arange(10, 20).reshape(2, 5)
    base, shallow = build_base(architecture), build_base(architecture)
    decoder, layers = find_layers(shallow)
    name = next(name for name, child in decoder.named_children() if list(child.children()) == layers)
    setattr(decoder, name, nn.ModuleList(layers[:1]))
    shallow.config.num_hidden_layers = 1
    with torch.no_grad():
        whole = base(ids).logits
        with lowest_layers(base, 1):
            torch.testing.assert_close(base(ids).logits, shallow(ids).logits, atol=0, rtol=0)
        with pytest.raises(KeyError), lowest_layers(base, 1):
            raise KeyError
        torch.testing.assert_close(base(ids).logits, whole, atol=0, rtol=0)
    assert not torch.allclose(whole, shallow(ids).logits)


class Renamed(nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states


def test_bases_of_another_kind_are_refused() -> None:
    base = build_base()
    base.model.layers[1] = Renamed()
    with pytest.raises(ValueError, match="layers of transformers' usual kind, got LlamaForCausalLM"):
        check_variants(RiMConfig(insertion_layer=1), base)
    check_variants(RiMConfig(), base)


@pytest.mark.parametrize("layer", [2, 7])
def test_layers_that_are_not_there_are_refused(layer: int) -> None:
    base = build_base()
    with pytest.raises(ValueError, match=f"insertion_layer: must be below the base's number of layers, 2, got {layer}"):
        get_peft_model(base, RiMConfig(insertion_layer=layer))
    assert type(base.get_input_embeddings()) is nn.Embedding  # as it was


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("options", [{"insertion_layer": 1}, {"bidirectional_blocks": True}], ids=str)
def test_attention_without_a_dense_mask_is_refused(implementation: str, options: dict[str, Any]) -> None:
    base = build_base()
    base.config._attn_implementation = implementation
    (option,) = [f"{name}={value}" for name, value in options.items()]
    message = f"attn_implementation: must be 'eager' or 'sdpa' with {option}, got '{implementation}'"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, RiMConfig(**options))


def test_attention_that_is_causal_whatever_the_mask_says_is_refused() -> None:
    config = GPTNeoConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    base = GPTNeoForCausalLM(config)
    with pytest.raises(ValueError, match="bidirectional_blocks: must be False for GPTNeoForCausalLM, got True"):
        check_variants(RiMConfig(bidirectional_blocks=True), base)
    check_variants(RiMConfig(insertion_layer=1), base)
    check_variants(
        RiMConfig(bidirectional_blocks=True), BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_head=2))
    )


def test_layers_that_use_the_keys_of_lower_ones_are_refused() -> None:
    base = build_base()
    base.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="insertion_layer: must be 0 for LlamaForCausalLM, got 1"):
        check_variants(RiMConfig(insertion_layer=1), base)
    check_variants(RiMConfig(bidirectional_blocks=True), base)
