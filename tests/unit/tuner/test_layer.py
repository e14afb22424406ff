from typing import Any

import pytest
import torch
from torch import nn

from rim_peft import RiMConfig
from rim_peft.tuner.memory_embedding import MemoryEmbedding, _mean_and_spread
from tests.conftest import MakeBase, MakeRim


def build_layer(*, dtype: torch.dtype = torch.float32, **options: Any) -> MemoryEmbedding:
    """A layer around an embedding with rows [0, 0], [1, 2], ... [9, 18]."""
    weight = torch.arange(10.0)[:, None] * torch.tensor([[1.0, 2.0]])
    layer = MemoryEmbedding(nn.Embedding.from_pretrained(weight.to(dtype)), 10)
    layer.add_adapter("default", RiMConfig(**options), initializer_range=0.02)
    return layer


def set_rows(layer: MemoryEmbedding, rows: list[list[float]]) -> None:
    with torch.no_grad():
        layer.rows("default").copy_(torch.tensor(rows))


def test_ids_from_v_on_look_up_memory_rows() -> None:
    layer = build_layer()
    set_rows(layer, [[0.5, 0.5], [-1.0, -2.0], [7.0, 8.0]])
    output = layer(torch.tensor([[3, 10, 11], [12, 0, 11]]))
    expected = [[[3.0, 6.0], [0.5, 0.5], [-1.0, -2.0]], [[7.0, 8.0], [0.0, 0.0], [-1.0, -2.0]]]
    torch.testing.assert_close(output, torch.tensor(expected))


def test_only_memory_rows_get_gradients() -> None:
    layer = build_layer()
    layer(torch.tensor([[3, 10, 11, 11]])).sum().backward()
    torch.testing.assert_close(layer.rows("default").grad, torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]))
    assert layer.get_base_layer().weight.grad is None


def test_rows_stay_float32_and_give_the_bases_type() -> None:
    layer = build_layer(dtype=torch.bfloat16)
    assert layer.rows("default").dtype == torch.float32
    assert layer(torch.tensor([[1, 10]])).dtype == torch.bfloat16
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.rows("default").dtype == torch.float32


def test_an_id_beyond_memory_is_named() -> None:
    with pytest.raises(ValueError, match=r"input_ids: ids must be below 10, .* memory ids that follow, got 13"):
        build_layer()(torch.tensor([[13]]))


def test_virtual_ids_need_an_enabled_adapter() -> None:
    layer = build_layer()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(torch.tensor([[9]])), torch.tensor([[[9.0, 18.0]]]))
    with pytest.raises(ValueError, match=r"input_ids: memory ids \(from 10 on\) need an enabled RiM adapter"):
        layer(torch.tensor([[9, 10]]))


def test_one_active_adapter_at_a_time() -> None:
    layer = build_layer()
    layer.add_adapter("other", RiMConfig(), initializer_range=0.02)
    with pytest.raises(ValueError, match="RiM has one active adapter at a time"):
        layer.set_adapter(["default", "other"])


def test_mean_and_spread_of_a_large_vocabulary() -> None:
    vocabulary = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5
    mean, spread = _mean_and_spread(vocabulary.to(torch.bfloat16))
    # bfloat16 rounds each value by up to 2**-8 of it, far more than the accumulation in float32 adds.
    torch.testing.assert_close(mean, vocabulary.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(spread, vocabulary.std(0, correction=0), atol=2e-3, rtol=0)


def test_vocabulary_start_has_the_vocabularys_mean_and_spread() -> None:
    torch.manual_seed(3)
    layer = build_layer()
    torch.manual_seed(3)
    nn.Embedding(3, 2)  # the layer's own, which draws first
    noise = torch.randn(3, 2)
    mean, spread = torch.tensor([4.5, 9.0]), torch.tensor([8.25, 33.0]).sqrt()
    torch.testing.assert_close(layer.rows("default").detach(), mean + spread * noise)


def test_token_start_copies_rows_in_turn_with_a_little_noise() -> None:
    rows = build_layer(init_memory=[4, 6]).rows("default").detach()
    spread = torch.tensor([8.25, 33.0]).sqrt()
    distance = (rows - torch.tensor([[4.0, 8.0], [6.0, 12.0], [4.0, 8.0]])) / spread
    assert 0 < distance.abs().max() < 0.5
    assert not torch.equal(rows[0], rows[2])


def test_random_start_has_the_bases_initializer_range() -> None:
    layer = MemoryEmbedding(nn.Embedding(10, 5000), 10)
    torch.manual_seed(0)
    layer.add_adapter("default", RiMConfig(init_memory="random"), initializer_range=0.02)
    # 15,000 draws: a standard error of 0.6 %
    torch.testing.assert_close(float(layer.rows("default").detach().std()), 0.02, atol=0, rtol=0.03)


@pytest.mark.parametrize("init_memory", ["vocabulary", "random", [5, 6, 7]])
def test_starts_follow_torchs_seed(make_base: MakeBase, make_rim: MakeRim, init_memory: Any) -> None:
    first, again = (make_rim(init_memory=init_memory, fresh=True).base_model.memory.rows("default") for _ in range(2))
    torch.testing.assert_close(first, again, atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ["gemma3", "llama_tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_means_what_it_would_in_the_bases_matrix(
    make_rim: MakeRim, make_base: MakeBase, architecture: str, dtype: torch.dtype
) -> None:
    model = make_rim(architecture, base=make_base(architecture).to(dtype))
    ids = torch.tensor([[40, 41, *model.peft_config["default"].block_tokens.ids(1), 42]])
    ours = model.base_model.memory(ids)
    rows = model.base_model.memory.rows("default").detach()
    theirs = make_base(architecture).to(dtype)
    theirs.resize_token_embeddings(ids.max() + 1, mean_resizing=False)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[-3:] = rows.to(dtype)
    torch.testing.assert_close(ours, theirs.get_input_embeddings()(ids), atol=0, rtol=0)
