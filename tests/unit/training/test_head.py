"""Which head is trained through: TRL's fused one where it says what the model says, else the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rim_peft.sequence import BlockTokens, Sample, build_layout
from rim_peft.training.head import FoundHead, Head, check_heads, choose_head, find_head, score_labels
from rim_peft.training.trl_plugin import fuse_head
from tests.conftest import ARCHITECTURES, build_base
from tests.unit.tuner.test_probing import build

OWN_HEADS: list[tuple[str, dict[str, Any]]] = [
    ("modernbert-decoder", {}),
    ("bert", {"is_decoder": True}),
    ("roberta", {"is_decoder": True}),
    ("electra", {"is_decoder": True}),
]
FUSED_HEADS = ("gemma2", "granite", "cohere", "olmo2", "phi", "opt", "gpt_neox", "stablelm", "mixtral", "bloom")


def with_fused_head(base: Any) -> Any:
    fuse_head(base)
    return base


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fused_head_is_taken_where_it_is_right(architecture: str) -> None:
    base = with_fused_head(build_base(architecture))
    assert choose_head(base) is choose_head(base, is_sharded=True) is Head.FUSED


@pytest.mark.parametrize("model_type", FUSED_HEADS)
def test_scales_caps_and_biases_are_known_to_it(model_type: str) -> None:
    options: dict[str, Any] = {"num_key_value_heads": 4} if model_type in ("stablelm", "mixtral") else {}
    options |= {"word_embed_proj_dim": 32, "n_head": 4} if model_type in ("opt", "bloom") else {}
    assert find_head(build(model_type, **options)) == FoundHead(Head.FUSED, is_causal=True)
    assert choose_head(with_fused_head(build(model_type, **options))) is Head.FUSED


@pytest.mark.parametrize(("model_type", "options"), OWN_HEADS, ids=[name for name, _ in OWN_HEADS])
def test_layers_between_states_and_matrix_make_it_the_models_own(
    model_type: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    base = with_fused_head(build(model_type, **options))
    with caplog.at_level("WARNING", "rim_peft"):
        assert choose_head(base) is Head.OWN
    assert "training uses its own head" in caplog.text
    assert find_head(base) == FoundHead(Head.OWN, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_head_says_what_its_logits_do(dtype: torch.dtype) -> None:
    base = with_fused_head(build("modernbert-decoder").to(dtype))
    blocks = BlockTokens(begin=20, memory=21, end=22, block_size=1)
    layout = build_layout([Sample([5, 6, 7], [[8, 9], [10, 2]]), Sample([5], [[11], [12]])], blocks, pad_id=0)
    labels = layout.labels()
    with torch.no_grad():
        assert choose_head(base) is Head.OWN
        found = score_labels(base, base, layout, labels, head=Head.OWN)
        # A plain pass over the first sample's trunk and its last readout.
        trunk = torch.tensor([[5, 6, 7, *blocks.ids(2), 10]])
        logits = base(input_ids=trunk).logits.float().log_softmax(-1)[0, -2:]
    expected = torch.stack([logits[0, 10], logits[1, 2]])
    of_it = (labels.documents == 0) & (labels.blocks == 2)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05  # bfloat16 rounds in another order
    torch.testing.assert_close(found.log_probs[0][of_it], expected, atol=tolerance, rtol=0)


def test_a_base_whose_logits_follow_from_no_state_is_refused() -> None:
    base = with_fused_head(build_base())

    class Mixes(nn.Linear):
        """An output matrix behind a mean over positions."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden + hidden.cumsum(1))

    base.lm_head.__class__ = Mixes
    with pytest.raises(ValueError, match=r"model: its logits must follow .* token by token, got LlamaForCausalLM"):
        choose_head(base)


def test_a_base_that_is_not_causal_is_refused() -> None:
    base = with_fused_head(build("roberta"))
    with pytest.raises(ValueError, match="model: must be causal, got RobertaForCausalLM"):
        choose_head(base)
    with pytest.raises(ValueError, match="model: must be causal"):
        check_heads(base, FoundHead(Head.FUSED, is_causal=False))


def test_choosing_leaves_modes_and_random_state_alone() -> None:
    base = with_fused_head(build_base("gpt2")).train()
    base.transformer.h[0].eval()
    modes = [module.training for module in base.modules()]
    state = torch.get_rng_state()
    choose_head(base)
    choose_head(base, is_sharded=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in base.modules()] == modes


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_output_matrix_is_the_models_own_affair(bits: int, tmp_path: Any) -> None:
    # On processors with AVX-512 and bfloat16, bitsandbytes takes 4-bit matrices by 32 rows only.
    build_base(hidden_size=64, intermediate_size=64, vocab_size=96).save_pretrained(tmp_path)
    options: Any = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    quantization = BitsAndBytesConfig(**options, llm_int8_skip_modules=["nothing"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    assert not isinstance(base.lm_head, nn.Linear) or type(base.lm_head) is not nn.Linear
    assert choose_head(with_fused_head(base)) is Head.OWN


@pytest.mark.slow
def test_every_causal_model_has_a_head() -> None:
    """With their config's defaults, as far as these can be built small."""
    found = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, is_decoder=True))
        except Exception:  # noqa: S112 - defaults that do not fit together, packages that are missing
            continue
        if (one := find_head(base)) is not None:
            found[name] = one
    assert len(found) > 110
    # Refused by trainers: ProphetNet's head is given its streams for future tokens, not the backbone's last state.
    refused = {"llama4", "llama4_text", "mllama", "prophetnet"}
    assert {name for name, one in found.items() if one.head is None} <= refused
    assert found["llama"].head is found["gemma3_text"].head is Head.FUSED
    assert found["modernbert-decoder"].head is Head.OWN
