"""The loss of plain text with and without blocks is that of rows laid out as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rim_peft.cli.main import main
from rim_peft.evaluation.plain_text import measure_text_loss
from rim_peft.sequence import Sample, build_layout
from rim_peft.training.head import Head, score_labels
from tests.conftest import BOS_ID, PAD_ID, build_base, build_rim

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "<eos> is text here, and so is this. " * 2]
CONTEXT, PREDICTED = 20, 10


def _expected(model: Any, tokenizer: Any, num_blocks: int) -> float:
    """The slow way: one window at a time, through the rows that trainers build."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for start in range(0, len(ids) - CONTEXT - PREDICTED + 1, CONTEXT + PREDICTED):
            context, predicted = ids[start : start + CONTEXT], ids[start + CONTEXT : start + CONTEXT + PREDICTED]
            if num_blocks:
                blocks = model.active_peft_config.block_tokens
                readouts: list[list[int]] = [[] for _ in range(num_blocks)]
                # A readout's first token is predicted by its block's end.
                readouts[-1] = predicted
                layout = build_layout([Sample(context, readouts)], blocks, pad_id=PAD_ID)
                with torch.no_grad():
                    scores = score_labels(model, model.get_base_model(), layout, layout.labels(), head=Head.OWN)
                losses.append(-scores.log_probs.mean().item())
            else:
                row = torch.tensor([context + predicted])
                with torch.no_grad():
                    logits = model(input_ids=row).logits[0, CONTEXT - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(predicted)).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "options", [{}, {"insertion_layer": 1}, {"bidirectional_blocks": True}], ids=["plain", "layer 1", "bidirectional"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_are_those_of_rows_as_in_training(
    architecture: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_rim(architecture, **options)
    sizes = {"context_tokens": CONTEXT, "predicted_tokens": PREDICTED}
    found = measure_text_loss(model, tokenizer, TEXTS, batch_size=3, **sizes)
    alone = measure_text_loss(model, tokenizer, TEXTS, batch_size=1, num_blocks=3, **sizes)
    assert found.num_windows == 6
    with model.disable_adapter():
        base = _expected(model, tokenizer, 0)
    for change, expected in (
        (found.base, base),
        (found.without_blocks, _expected(model, tokenizer, 0)),
        (found.with_blocks, _expected(model, tokenizer, 2)),
        (alone.with_blocks, _expected(model, tokenizer, 3)),
    ):
        assert change is not None
        assert change.loss == pytest.approx(expected, abs=1e-5)
        assert change.change == pytest.approx(expected - base, abs=1e-5)
    assert found.base.standard_error == 0
    assert found.without_blocks.standard_error > 0


def test_a_fresh_adapter_without_blocks_forgets_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    found = measure_text_loss(build_rim(fresh=True), tokenizer, TEXTS, context_tokens=CONTEXT, predicted_tokens=10)
    assert found.without_blocks == found.base
    none = measure_text_loss(
        build_rim(num_blocks=0), tokenizer, TEXTS, context_tokens=CONTEXT, predicted_tokens=PREDICTED
    )
    assert none.with_blocks is None


def test_windows_begin_as_the_tokenizer_begins_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"context_tokens": CONTEXT, "predicted_tokens": PREDICTED}
    model = build_rim()
    without = measure_text_loss(model, tokenizer, TEXTS, **sizes)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
    with_bos = measure_text_loss(model, tokenizer, TEXTS, **sizes)
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"][1:] for text in TEXTS]
    losses = []
    for row in ids:
        for start in range(0, len(row) - CONTEXT - PREDICTED + 1, CONTEXT + PREDICTED):
            window = torch.tensor([[BOS_ID, *row[start : start + CONTEXT + PREDICTED]]])
            with model.disable_adapter(), torch.no_grad():
                logits = model(input_ids=window).logits[0, CONTEXT:-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, CONTEXT + 1 :]).item())
    assert with_bos.base.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert with_bos.base.loss != pytest.approx(without.base.loss, abs=1e-4)


def test_the_model_stays_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim().requires_grad_(False).train()
    measure_text_loss(model, tokenizer, TEXTS, context_tokens=CONTEXT, predicted_tokens=PREDICTED)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_what_cannot_be_measured_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(base=build_base(max_position_embeddings=195))
    long = "a" * 400
    for texts, options, said in (
        (["a" * 200], {}, "text: must have at least two windows of 192 tokens, got 1 in 1 texts"),
        ([long, "short"], {}, "text: each must have at least one window.*got 5 in text 2"),
        ([long], {"num_blocks": 1}, "must fit into the base's 195 positions.*96 \\+ 96 tokens and 4 of 1 blocks"),
        ([long], {"num_blocks": -1}, "num_blocks: must be an integer of at least 0, got -1"),
        ([long], {"batch_size": 0}, "batch_size: must be an integer of at least 1, got 0"),
        ([long], {"context_tokens": 0}, "context_tokens: must be an integer of at least 1, got 0"),
        ([long], {"predicted_tokens": 0}, "predicted_tokens: must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            measure_text_loss(model, tokenizer, texts, **{"num_blocks": 0, **options})
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight").fill_(torch.nan)
    with pytest.raises(ValueError, match=r"model: its loss must be finite, got .*nan.* for without blocks"):
        measure_text_loss(model, tokenizer, [long], num_blocks=0)
    merged = build_rim()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="model: must not be merged"):
        measure_text_loss(merged, tokenizer, [long])


def test_the_command_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    base = build_base()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = build_rim(base=base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    text = tmp_path / "text.txt"
    text.write_text("All work and no play. " * 40, encoding="utf-8")
    assert main(["evaluate", str(tmp_path / "adapter"), "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "4 windows of plain text: 96 tokens after 96" in printed
    assert "adapter, 2 blocks" in printed
    for arguments, said in (
        (["--text", str(text), "--limit", "3"], "text: must be given without --limit"),
        (["--text", str(text), "--split", "test"], "text: must be given without --split"),
        (["--window-tokens", "8"], "window_tokens: must be given with --text"),
        (["--text", str(text), "--window-tokens", "1"], "window_tokens: must be an integer of at least 2, got 1"),
        (["--text", str(tmp_path / "adapter" / "adapter_model.safetensors")], "must be a file of UTF-8 text"),
        (["--text", str(tmp_path / "none")], "none"),
    ):
        assert main(["evaluate", str(tmp_path / "adapter"), *arguments]) == 1
        assert said in capsys.readouterr().err
