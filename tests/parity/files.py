"""Behaviours of adapters as files: saved, and loaded by every route."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.parity.subject import Subject, pretend_training


def _saved(subject: Subject) -> tuple[Any, str]:
    """A model and the folder that its adapter was saved to."""
    model, folder = subject.model(), str(subject.folder / "adapter")
    model.save_pretrained(folder)
    return model, folder


def _check_same(subject: Subject, loaded: Any, model: Any, *, is_cast: bool = False) -> None:
    """The same answers and adapter; ``is_cast`` where PEFT gives loaded LoRA the type of a bf16 base."""
    loaded.eval()
    found = {name.split(".lora_", 1)[1]: value for name, value in subject.adapter_tensors(loaded).items()}
    expected = {name.split(".lora_", 1)[1]: value for name, value in subject.adapter_tensors(model).items()}
    assert found.keys() == expected.keys()
    if is_cast and subject.case.format == "bf16":
        subject.check_alike(subject.logits(loaded), subject.logits(model))
        found = {name: value for name, value in found.items() if "rim_memory" in name}  # which stays in float32
        expected = {name: expected[name] for name in found}
    else:
        torch.testing.assert_close(subject.logits(loaded), subject.logits(model), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(subject.generate(loaded), subject.generate(model))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def save_and_load(subject: Subject) -> None:
    """`save_pretrained`, safetensors alone; `PeftModel.from_pretrained`"""
    model, folder = _saved(subject)
    names = {path.name for path in Path(folder).iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) == model.get_nb_trainable_parameters()[0]
    loaded = PeftModel.from_pretrained(subject.base(), folder)
    _check_same(subject, loaded, model)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def load_with_little_memory(subject: Subject) -> None:
    """`PeftModel.from_pretrained(low_cpu_mem_usage=True)`"""
    model, folder = _saved(subject)
    loaded = PeftModel.from_pretrained(subject.base(), folder, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    _check_same(subject, loaded, model, is_cast=True)


def load_by_auto_class(subject: Subject) -> None:
    """`AutoPeftModelForCausalLM.from_pretrained`"""
    model, folder = _saved(subject)
    _check_same(subject, AutoPeftModelForCausalLM.from_pretrained(folder, **subject.load_options), model)


def load_by_transformers(subject: Subject) -> None:
    """`AutoModelForCausalLM.from_pretrained(adapter)`"""
    model, folder = _saved(subject)
    _check_same(subject, AutoModelForCausalLM.from_pretrained(folder, **subject.load_options), model, is_cast=True)


def load_onto_a_transformers_model(subject: Subject) -> None:
    """transformers' own `model.load_adapter`, `disable_adapters`, `enable_adapters`, `set_adapter`"""
    model, folder = _saved(subject)
    native = subject.base()
    expected = subject.plain_logits(native) if subject.case.format in ("fp32", "bf16") else None
    native.load_adapter(folder)
    _check_same(subject, native, model, is_cast=True)
    adapted = subject.logits(native)
    native.load_adapter(folder, adapter_name="second")
    native.set_adapter("second")
    native.disable_adapters()
    if expected is not None:
        torch.testing.assert_close(subject.plain_logits(native), expected, atol=0, rtol=0)
    native.enable_adapters()
    torch.testing.assert_close(subject.logits(native), adapted, atol=0, rtol=0)


def several_adapters_in_a_folder(subject: Subject) -> None:
    """several adapters: saved side by side, `selected_adapters`, `load_adapter`"""
    model = subject.with_other()
    folder = str(subject.folder / "adapter")
    model.save_pretrained(folder)
    loaded: Any = PeftModel.from_pretrained(subject.base(), folder)
    loaded.load_adapter(f"{folder}/other", "other")
    for name in ("other", "default"):
        for one in (model, loaded):
            one.set_adapter(name)
            one.eval()
        torch.testing.assert_close(subject.logits(loaded), subject.logits(model), atol=1e-5, rtol=1e-5)
    chosen = subject.folder / "chosen"
    model.save_pretrained(str(chosen), selected_adapters=["other"])
    assert [path.name for path in chosen.iterdir() if path.is_dir()] == ["other"]
    assert not (chosen / "adapter_config.json").exists()


def load_with_a_given_config(subject: Subject) -> None:
    """`from_pretrained(config=)`"""
    model, folder = _saved(subject)
    loaded = PeftModel.from_pretrained(subject.base(), folder, config=PeftConfig.from_pretrained(folder))
    _check_same(subject, loaded, model)


def train_after_loading(subject: Subject) -> None:
    """`from_pretrained(is_trainable=True)`: training goes on"""
    _, folder = _saved(subject)
    loaded: Any = PeftModel.from_pretrained(subject.base(), folder, is_trainable=True).train()
    before = subject.adapter_tensors(loaded)
    loaded(**subject.batch(), labels=subject.labels()).loss.backward()
    torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1).step()
    after = subject.adapter_tensors(loaded)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    loaded.save_pretrained(folder)
    again = PeftModel.from_pretrained(subject.base(), folder)
    torch.testing.assert_close(subject.adapter_tensors(again), after, atol=0, rtol=0)


def state_dicts(subject: Subject) -> None:
    """`get_peft_model_state_dict`, `set_peft_model_state_dict`"""
    model = subject.model()
    other = subject.model(is_fresh=True)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    torch.testing.assert_close(subject.logits(other), subject.logits(model), atol=0, rtol=0)


def copy_a_config(subject: Subject) -> None:
    """configurations: pickle, deepcopy, `from_pretrained`"""
    config = subject.model().peft_config["default"]
    folder = str(subject.folder / "config")
    config.save_pretrained(folder)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()  # noqa: S301
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    loaded = PeftConfig.from_pretrained(folder)
    assert type(loaded) is type(config)
    expected, found = config.to_dict(), loaded.to_dict()
    assert {name for name in expected if expected[name] != found[name]} <= {"inference_mode"}


def copy_a_model(subject: Subject) -> None:
    """`copy.deepcopy` of an adapted model"""
    model = subject.model()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(subject.logits(copied), subject.logits(model), atol=0, rtol=0)
    torch.testing.assert_close(subject.generate(copied), subject.generate(model))


def swap_an_adapter(subject: Subject) -> None:
    """`hotswap_adapter`"""
    model = subject.with_other()
    model.save_pretrained(str(subject.folder))
    before = subject.logits(model)
    model.set_adapter("other")
    expected = subject.logits(model.eval())
    model.set_adapter("default")
    hotswap_adapter(model, str(subject.folder / "other"), adapter_name="default")
    torch.testing.assert_close(subject.logits(model), expected, atol=0, rtol=0)
    assert not torch.allclose(expected, before)


def inject(subject: Subject) -> None:
    """`inject_adapter_in_model`, without a `PeftModel`"""
    model = subject.model()
    torch.manual_seed(1)
    injected = inject_adapter_in_model(subject.config(), subject.base())
    pretend_training(injected)
    subject.check_alike(subject.logits(injected.eval()), subject.logits(model))


BEHAVIOURS = (
    save_and_load,
    load_with_little_memory,
    load_by_auto_class,
    load_by_transformers,
    load_onto_a_transformers_model,
    several_adapters_in_a_folder,
    load_with_a_given_config,
    train_after_loading,
    state_dicts,
    copy_a_config,
    copy_a_model,
    swap_an_adapter,
    inject,
)
