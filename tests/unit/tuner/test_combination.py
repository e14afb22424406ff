"""Adapters combined by weights, and one put in the place of another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from rim_peft import RiMConfig
from tests.conftest import VOCAB_SIZE, MakeBase, MakeRim, randomize_lora

MEMORY = torch.tensor([[20, 30, VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE + 2]])
WEIGHTS = [0.7, 0.3]
KINDS = ["svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties_svd", "magnitude_prune"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=MEMORY).logits
    return result


@pytest.fixture
def make_two(make_rim: MakeRim) -> MakeRim:
    """A model with the adapters ``default`` and ``other``, whose blocks are the same."""

    def make(architecture: str = "llama", **options: Any) -> Any:
        model = make_rim(architecture, **options)
        model.add_adapter("other", RiMConfig(**{"num_blocks": 2, "r": 4, **options}))
        randomize_lora(model)
        return model

    return make


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 3}, {"r": 0}], ids=str)
def test_the_combination_is_the_weighted_sum_of_rows_and_of_lora(make_two: MakeRim, options: dict[str, Any]) -> None:
    model = make_two(**options)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type="cat")
    rows = [model.base_model.memory.rows(name).detach() for name in ("default", "other", "both")]
    torch.testing.assert_close(rows[2], 0.7 * rows[0] + 0.3 * rows[1])
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert bool(layers) == (options.get("r") != 0)
    for layer in layers:
        first, second, both = (layer.get_delta_weight(name) for name in ("default", "other", "both"))
        torch.testing.assert_close(both, 0.7 * first + 0.3 * second, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".both." in name)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_weight_1_is_itself(make_two: MakeRim, kind: str, options: dict[str, Any]) -> None:
    model = make_two(**options)
    expected = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "both", combination_type=kind, density=1.0)
    torch.testing.assert_close(
        model.base_model.memory.rows("both"), model.base_model.memory.rows("default"), atol=0, rtol=0
    )
    if not kind.startswith(("ties", "dare_ties")):  # which elect signs among both
        model.set_adapter("both")
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)  # another order of summation


def test_a_combined_adapter_generates_trains_and_is_saved(
    make_two: MakeRim, make_base: MakeBase, tmp_path: Any
) -> None:
    model = make_two(use_rslora=True)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type="svd")
    model.set_adapter("both")
    expected = logits(model)
    answer = model.generate(MEMORY[:, :2], max_new_tokens=4)
    model.save_pretrained(str(tmp_path), selected_adapters=["both"])
    loaded: Any = PeftModel.from_pretrained(make_base(), str(tmp_path / "both"))
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(loaded.generate(MEMORY[:, :2], max_new_tokens=4), answer)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".both." in name for name in trainable)


def test_memory_alone_joins_an_adapter_with_lora(make_rim: MakeRim) -> None:
    model = make_rim(target_modules=["q_proj"])
    model.add_adapter("memory", RiMConfig(num_blocks=2, r=0))
    model.add_weighted_adapter(["memory", "default"], WEIGHTS, "both", combination_type="linear")
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    torch.testing.assert_close(layer.get_delta_weight("both"), 0.3 * layer.get_delta_weight("default"))
    rows = [model.base_model.memory.rows(name) for name in ("memory", "default", "both")]
    torch.testing.assert_close(rows[2], 0.7 * rows[0] + 0.3 * rows[1])


def test_a_name_that_is_taken_is_left_as_it_is(make_two: MakeRim) -> None:
    model = make_two()
    expected = logits(model)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "default")
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_blocks", 3), ("block_size", 1), ("insertion_layer", 1), ("bidirectional_blocks", True)],
)
def test_adapters_with_other_blocks_are_not_combined(make_rim: MakeRim, option: str, value: object) -> None:
    model = make_rim()
    model.add_adapter("other", RiMConfig(**{"num_blocks": 2, "r": 4, option: value}))
    with pytest.raises(ValueError, match=f"{option}: must be the same for all combined adapters, got "):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "both")
    assert "both" not in model.peft_config


def test_combinations_that_mean_nothing_are_refused(make_two: MakeRim) -> None:
    model = make_two()
    for adapters, weights, message in (
        (["default", "typo"], WEIGHTS, r"adapters: must be some of \['default', 'other'\], got \['default', 'typo'\]"),
        ([], [], "adapters: must be some of"),
        (["default", "other"], [1.0], "weights: must be a number for each of the 2 adapters, got"),
        (["default", "other"], [1.0, float("nan")], "weights: must be a number for each of the 2 adapters, got"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(adapters, weights, "both")
    with pytest.raises(ValueError, match="use_dora: must be False for all combined adapters"):
        make_two(use_dora=True).add_weighted_adapter(["default", "other"], WEIGHTS, "both")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"insertion_layer": 1}], ids=str)
def test_an_adapter_is_swapped_for_one_in_a_file(make_two: MakeRim, tmp_path: Any, options: dict[str, Any]) -> None:
    model = make_two(**options)
    model.save_pretrained(str(tmp_path))
    before = logits(model)
    model.set_adapter("other")
    expected, answer = logits(model), model.generate(MEMORY[:, :2], max_new_tokens=4)
    model.set_adapter("default")
    hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default")
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)
    torch.testing.assert_close(model.generate(MEMORY[:, :2], max_new_tokens=4), answer)
    assert not torch.allclose(expected, before)


def test_an_adapter_with_other_blocks_is_not_swapped_in(make_rim: MakeRim, tmp_path: Any) -> None:
    model = make_rim()
    make_rim(num_blocks=5).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Configs are incompatible: for num_blocks, 2 != 5"):  # PEFT's own check
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"vocab_size": VOCAB_SIZE + 8},
            f"adapter's own base, first_memory_id {VOCAB_SIZE + 8}, got first_memory_id {VOCAB_SIZE}:",
        ),
        ({"num_hidden_layers": 1}, "adapter's own base, num_hidden_layers 1, got num_hidden_layers 2:"),
    ],
)
def test_an_adapter_of_another_base_is_not_swapped_in(
    make_rim: MakeRim, make_base: MakeBase, tmp_path: Any, other: dict[str, int], message: str
) -> None:
    """PEFT would put the tensors that fit in, and zeros for the others."""
    model = make_rim()
    expected = logits(model)
    make_rim(base=make_base(**other)).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize(("r", "other"), [(0, 4), (4, 0), (0, 0)])
def test_memory_alone_is_not_swapped(make_rim: MakeRim, tmp_path: Any, r: int, other: int) -> None:
    make_rim(r=other).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=f"r: must be at least 1 to swap adapters in place, got {r} and {other}"):
        hotswap_adapter(make_rim(r=r), str(tmp_path), adapter_name="default")


def test_stock_adapters_are_swapped_as_before(make_base: MakeBase, tmp_path: Any) -> None:
    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    other: Any = get_peft_model(make_base(), LoraConfig(r=2, **config))
    randomize_lora(other)
    other.save_pretrained(str(tmp_path))
    model: Any = get_peft_model(make_base(), LoraConfig(r=4, **config))
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    ids = MEMORY[:, :2]
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_ranks_of_their_own_come_back_from_a_file(
    make_two: MakeRim, make_base: MakeBase, tmp_path: Any, kind: str
) -> None:
    model = make_two(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7})
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type=kind)
    model.set_adapter("both")
    model.save_pretrained(str(tmp_path), selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(make_base(), str(tmp_path / "both"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"lora_bias": True}, {"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"], "r": 0}], ids=str
)
def test_weights_that_would_be_left_out_are_not_combined(make_two: MakeRim, options: dict[str, Any]) -> None:
    model = make_two(**options)
    with pytest.raises(ValueError, match=f"{next(iter(options))}: must be .* for all combined adapters"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "both")
    assert "both" not in model.peft_config
