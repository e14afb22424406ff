"""What a pass's hooks share, and what they say where they cannot know where memory lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rim_peft import RiMConfig
from tests.conftest import VOCAB_SIZE, build_base, build_rim

BLOCK = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE + 2]


def build(**options: Any) -> Any:
    return build_rim(base=build_base(num_hidden_layers=4), insertion_layer=2, bidirectional_blocks=True, **options)


def test_layers_share_edited_masks() -> None:
    masks: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        masks.append(kwargs["attention_mask"])

    model = build()
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([[5, *BLOCK]]))
    assert masks[0] is masks[1]
    assert masks[2] is masks[3]
    assert masks[0].tolist() != masks[2].tolist()


def test_a_pass_of_one_token_gets_no_mask_where_none_is_needed() -> None:
    masks: list[Tensor | None] = []
    model = build()
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda *call: masks.append(call[2]["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        cache = model(torch.tensor([[5, *BLOCK]]), use_cache=True).past_key_values
        masks.clear()
        model(torch.tensor([[6]]), past_key_values=cache)
    assert masks[2:] == [None, None]
    assert masks[0] is not None
    assert masks[0].tolist() == [[[[True, False, False, False, False, True]]]]


def test_hooks_come_with_the_first_adapter_that_asks_for_them_and_once() -> None:
    model = build_rim()
    layer = model.get_base_model().model.layers[0]
    configs = {"plain": RiMConfig(r=2), "joined": RiMConfig(r=2, bidirectional_blocks=True)}
    for name, config in {**configs, "late": RiMConfig(r=2, insertion_layer=1)}.items():
        model.add_adapter(name, config)
        assert len(layer._forward_pre_hooks) == (name != "plain")
    model.delete_adapter("joined")
    assert len(layer._forward_pre_hooks) == 1
    model.merge_and_unload()
    assert len(layer._forward_pre_hooks) == 0


def test_rows_of_a_cache_must_be_known() -> None:
    model = build()
    cache = DynamicCache()
    ids = torch.tensor([[5, *BLOCK, 6], [5, 6, *BLOCK]])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(
            ValueError, match=r"(cache|past_key_values): must keep its 2 rows, .* got 1 rows of input_ids"
        ):
            model(torch.tensor([[7]]), past_key_values=cache)
        cache = DynamicCache()
        model(ids[:1].repeat(3, 1), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        alone = model(torch.tensor([[7]]), past_key_values=cache).logits
        torch.testing.assert_close(alone, model(torch.tensor([[5, *BLOCK, 6, 7]])).logits[:, -1:])


def test_a_mask_must_have_all_columns_and_no_more() -> None:
    mask = torch.zeros(1, 1, 2, 9)
    with pytest.raises(ValueError, match="attention_mask: must have a column for each token so far, got 9"):
        build()(torch.tensor([[5, 6]]), attention_mask=mask)


def test_a_decoder_that_keeps_arguments_to_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    decoder = model.get_base_model().model
    forward = decoder.forward

    def narrow(input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return forward(input_ids, **{name: value for name, value in kwargs.items() if name != "rim_memory_pass"})

    monkeypatch.setattr(decoder, "forward", narrow)
    with pytest.raises(ValueError, match=r"keyword arguments on .* got LlamaForCausalLM, whose layer 0"):
        model(torch.tensor([[5, *BLOCK]]))
