"""Masks against matrices drawn by hand, and the configs that are refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, JambaConfig, LlamaConfig, MambaConfig, T5Config

from rim_peft.sequence import BlockTokens, Sample, build_layout, pack_rows
from rim_peft.tuner.bases import attention_masks, check_architecture

BLOCKS = BlockTokens(begin=90, memory=91, end=92, block_size=1)
LAYOUT = build_layout([Sample([5, 6], [[7], [8]]), Sample([5], [[7]])], BLOCKS, pad_id=0)
FULL = """
x.........
xx........
xxx.......
xxxx......
xxxxx.....
xxxxxx....
xxxxx.x...
xxxxx.xx..
xxxxx.xxx.
xxxxx.xxxx
"""
# A window of 3 positions. The readouts sit at positions 5 and 8, block 2 at 5 to 7: the first row of block 2 reaches
# back to position 3, which lies four indices before it.
WINDOW_3 = """
x.........
xx........
xxx.......
.xxx......
..xxx.....
...xxx....
...xx.x...
....x.xx..
......xxx.
.......xxx
"""
PADDED = """
x.........
xx........
xxx.......
xxxx......
xxxxx.....
.....x....
.....xx...
.....xxx..
.....xxxx.
.....xxxxx
"""


def _config(**fields: Any) -> Any:
    config = SimpleNamespace(model_type="test", is_encoder_decoder=False, _attn_implementation="sdpa", **fields)
    config.get_text_config = lambda: config
    return config


def _drawn(picture: str) -> torch.Tensor:
    return torch.tensor([[mark == "x" for mark in line] for line in picture.split()])


def _additive(allowed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def test_full_attention_by_hand() -> None:
    mask = attention_masks(_config(), LAYOUT, dtype=torch.float32)
    torch.testing.assert_close(mask[0, 0], _additive(_drawn(FULL)))


def test_tokens_and_padding_do_not_see_each_other() -> None:
    mask = attention_masks(_config(), LAYOUT, dtype=torch.bfloat16)
    # The second row is [5, b, m, e, 7] and five paddings, which read each other, so that no row is empty.
    torch.testing.assert_close(mask[1, 0], _additive(_drawn(PADDED), torch.bfloat16))


def test_samples_in_one_row_do_not_meet() -> None:
    packed = pack_rows(LAYOUT, 15)
    assert packed.input_ids.shape == (1, 15)
    mask = attention_masks(_config(), packed, dtype=torch.float32)
    expected = torch.zeros(15, 15, dtype=torch.bool)
    expected[:10, :10] = _drawn(FULL)
    expected[10:, 10:] = torch.ones(5, 5, dtype=torch.bool).tril()  # a prompt, a block, and a readout behind it
    torch.testing.assert_close(mask[0, 0], _additive(expected))


def test_windows_count_positions() -> None:
    mask = attention_masks(_config(sliding_window=3), LAYOUT, dtype=torch.float32)
    torch.testing.assert_close(mask[0, 0], _additive(_drawn(WINDOW_3)))


# Decoding computes the trunk first, then the first token of both readouts (places 5 and 10), then the second (6 and
# 11). A cache of fixed length has columns for all of them from the start.
ORDER = [0, 1, 2, 3, 4, 7, 8, 9, 5, 10, 6, 11]
ROOM = build_layout(
    [Sample([5, 6], [[0, 0], [0, 0]]), Sample([5], [[0, 0], [0, 0]])], BLOCKS, pad_id=0, padding_side="left"
)
FIRST_TOKENS = """
xxxxx...x...
xxxxxxxx.x..
"""
SECOND_TOKENS = """
xxxxx...x.x.
xxxxxxxx.x.x
"""
# Positions 5 and 8, then 6 and 9.
FIRST_TOKENS_WINDOW_3 = """
...xx...x...
......xx.x..
"""
SECOND_TOKENS_WINDOW_3 = """
....x...x.x.
.......x.x.x
"""


@pytest.mark.parametrize(
    ("queries", "window", "picture"),
    [
        ([5, 10], None, FIRST_TOKENS),
        ([6, 11], None, SECOND_TOKENS),
        ([5, 10], 3, FIRST_TOKENS_WINDOW_3),
        ([6, 11], 3, SECOND_TOKENS_WINDOW_3),
    ],
)
@pytest.mark.parametrize("num_columns", [12, 10])
def test_decoding_by_hand(queries: list[int], window: int | None, picture: str, num_columns: int) -> None:
    keys = torch.tensor(ORDER[:num_columns] if queries == [5, 10] else ORDER)
    config = _config(sliding_window=window)
    mask = attention_masks(config, ROOM, dtype=torch.float32, places=(torch.tensor(queries), keys))
    expected = _drawn(picture)[:, : len(keys)]
    torch.testing.assert_close(mask[0, 0], _additive(expected))
    padded = expected.clone()
    padded[:, 0] = False  # the other row's prompt is one token shorter
    torch.testing.assert_close(mask[1, 0], _additive(padded))


def test_layers_that_differ_get_a_mask_each() -> None:
    kinds = ["sliding_attention", "full_attention"]
    masks = attention_masks(_config(sliding_window=3, layer_types=kinds), LAYOUT, dtype=torch.float32)
    assert set(masks) == set(kinds)
    torch.testing.assert_close(masks["full_attention"][0, 0], _additive(_drawn(FULL)))
    torch.testing.assert_close(masks["sliding_attention"][0, 0], _additive(_drawn(WINDOW_3)))


def test_a_window_that_no_layer_uses_does_not_count() -> None:
    config = _config(sliding_window=3, layer_types=["full_attention"] * 2)
    mask = attention_masks(config, LAYOUT, dtype=torch.float32)
    torch.testing.assert_close(mask[0, 0], _additive(_drawn(FULL)))


def test_flex_attention_gets_the_same_predicate() -> None:
    config = _config()
    config._attn_implementation = "flex_attention"
    mask = attention_masks(config, LAYOUT, dtype=torch.float32)
    index = torch.arange(10)
    evaluated = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    torch.testing.assert_close(evaluated, _drawn(FULL))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "paged|sdpa"])
def test_implementations_with_a_padding_mask_alone_are_refused(implementation: str) -> None:
    config = _config()
    config._attn_implementation = implementation
    with pytest.raises(ValueError, match=r"attn_implementation: .*cannot express.*eager, sdpa, flex_attention"):
        attention_masks(config, LAYOUT, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (MambaConfig(), "cannot hide readouts"),
        (JambaConfig(), "cannot hide readouts"),
        (FalconConfig(alibi=True), "ALiBi"),
    ],
)
def test_architectures_that_cannot_branch_are_refused(config: Any, reason: str) -> None:
    config._attn_implementation = "eager"
    with pytest.raises(ValueError, match=reason):
        attention_masks(config, LAYOUT, dtype=torch.float32)


def test_models_without_position_ids_are_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM takes no `position_ids`"):
        check_architecture(model)


def test_a_model_that_can_branch_passes() -> None:
    class Model(nn.Module):
        config = LlamaConfig(attn_implementation="eager")

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None: ...

    check_architecture(Model())
