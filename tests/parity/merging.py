"""Behaviours of LoRA in the base's weights: merged, unmerged, checked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from rim_peft.tuner.bases import keep_unpacked
from tests.parity.subject import Subject


def _quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call without warnings: merging rounds, and says so; RiM says that memory is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def merge_and_unmerge(subject: Subject) -> None:
    """`merge_adapter`, `unmerge_adapter`: each twice is as once"""
    model = subject.model()
    expected = subject.logits(model)
    for _ in range(2):
        _quietly(model.merge_adapter)
        merged = subject.logits(model)
        subject.check_alike(merged, expected)
        assert model.get_model_status().merged_adapters == ["default"]
    for _ in range(2):
        _quietly(model.unmerge_adapter)
        assert model.get_model_status().merged_adapters == []
        subject.check_alike(subject.logits(model), expected)


def merge_and_unload(subject: Subject) -> None:
    """`merge_and_unload`: a plain model with LoRA in its weights"""
    model = subject.model()
    expected = subject.plain_logits(model)
    merged = _quietly(model.merge_and_unload)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    subject.check_alike(subject.plain_logits(merged), expected)
    assert subject.generate(merged).shape == (2, 10)


def save_a_merged_model(subject: Subject) -> None:
    """a merged model: `save_pretrained`, loaded without PEFT"""
    merged = _quietly(subject.model().merge_and_unload)
    merged.save_pretrained(subject.folder)
    loaded = type(merged).from_pretrained(subject.folder, dtype=subject.load_options["dtype"]).eval()
    keep_unpacked(loaded)  # the same kernel as under the adapter; the other one takes few sizes
    subject.check_alike(subject.plain_logits(loaded), subject.plain_logits(merged))


def merge_safely(subject: Subject) -> None:
    """safe merging: the same weights, and NaN is refused with the base left as it was"""
    first, second = subject.model(), subject.model()
    _quietly(first.merge_adapter)
    _quietly(second.merge_adapter, safe_merge=True)
    subject.check_alike(subject.logits(second), subject.logits(first))
    _quietly(second.unmerge_adapter)
    layers = [module for module in second.modules() if isinstance(module, LoraLayer)]
    if not layers:
        return
    with torch.no_grad():
        layers[0].lora_A["default"].weight.fill_(torch.nan)
    with second.disable_adapter():
        expected = subject.plain_logits(second)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        _quietly(second.merge_adapter, safe_merge=True)
    with second.disable_adapter():
        torch.testing.assert_close(subject.plain_logits(second), expected, atol=0, rtol=0)


def merge_several(subject: Subject) -> None:
    """several adapters merged: one after the other, at once, and undone"""
    model, other = subject.with_other(), subject.with_other()
    expected = subject.logits(model)
    _quietly(model.merge_adapter, adapter_names=["default", "other"])
    assert model.get_model_status().merged_adapters == ["default", "other"]
    _quietly(other.merge_adapter, adapter_names=["default"])
    _quietly(other.merge_adapter, adapter_names=["other"])
    subject.check_alike(subject.logits(other), subject.logits(model))
    _quietly(model.unmerge_adapter)
    subject.check_alike(subject.logits(model), expected)
    merged = _quietly(model.merge_and_unload, adapter_names=["default", "other"])
    subject.check_alike(subject.plain_logits(merged), subject.plain_logits(other))


def disable_while_merged(subject: Subject) -> None:
    """`disable_adapter` while merged: the base, then the adapter again"""
    model = subject.model()
    expected = subject.logits(model)
    with model.disable_adapter():
        plain = subject.plain_logits(model)
    _quietly(model.merge_adapter)
    with model.disable_adapter():
        subject.check_alike(_quietly(subject.plain_logits, model), plain)
    subject.check_alike(subject.logits(model), expected)


BEHAVIOURS = (
    merge_and_unmerge,
    merge_and_unload,
    save_a_merged_model,
    merge_safely,
    merge_several,
    disable_while_merged,
)
