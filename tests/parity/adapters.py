"""Behaviours of adapters on a model: added, chosen, disabled, removed, combined, mixed, counted."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from peft import initialize_lora_eva_weights
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from tests.parity.subject import Subject, pretend_training


def add_set_and_delete(subject: Subject) -> None:
    """`add_adapter`, `set_adapter`, `delete_adapter`: the active one, another one, an unknown one"""
    model = subject.with_other()
    first = subject.logits(model)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert not torch.allclose(first, subject.logits(model.eval()))
    model.delete_adapter("other")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    torch.testing.assert_close(subject.logits(model.eval()), first, atol=0, rtol=0)
    model.add_adapter("third", subject.config())
    model.delete_adapter("third")
    torch.testing.assert_close(subject.logits(model.eval()), first, atol=0, rtol=0)
    assert not any(".third" in name or ".other" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"does not exist|not found"):
        model.delete_adapter("unknown")


def only_the_active_adapter_trains(subject: Subject) -> None:
    """which parameters train: the active adapter's alone; `set_requires_grad`"""
    model = subject.with_other()
    for name, other in (("default", "other"), ("other", "default")):
        model.set_adapter(name)
        trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        assert trainable
        assert all("lora_" in key and f".{name}" in key and f".{other}" not in key for key in trainable)
    model.set_requires_grad("other", requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def a_fresh_adapter_changes_nothing(subject: Subject) -> None:
    """a new adapter leaves the base's logits as they are"""
    model = subject.model(is_fresh=True)
    with model.disable_adapter():
        expected = subject.plain_logits(model)
    subject.check_alike(subject.plain_logits(model), expected)


def disable(subject: Subject) -> None:
    """`disable_adapter`, `disable_adapter_layers`, `enable_adapter_layers`"""
    model = subject.model()
    adapted = subject.logits(model)
    with model.disable_adapter():
        plain, answer = subject.plain_logits(model), subject.generate(model)
    torch.testing.assert_close(subject.logits(model), adapted, atol=0, rtol=0)
    if subject.case.format in ("fp32", "bf16"):
        base = subject.base()
        torch.testing.assert_close(plain, subject.plain_logits(base), atol=0, rtol=0)
        torch.testing.assert_close(answer, subject.generate(base))
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(subject.plain_logits(model), plain, atol=0, rtol=0)
    model.base_model.enable_adapter_layers()
    torch.testing.assert_close(subject.logits(model), adapted, atol=0, rtol=0)


def unload(subject: Subject) -> None:
    """`unload`: the base as it was"""
    model = subject.model()
    with model.disable_adapter():
        expected = subject.plain_logits(model)
    head = loaded_head(model)
    base = model.unload()
    torch.testing.assert_close(subject.plain_logits(base), expected, atol=0, rtol=0)
    assert not any("lora_" in name for name, _ in base.named_parameters())
    is_tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert is_tied == head


def loaded_head(model: Any) -> bool:
    """Whether a model's head shares the embedding's weight."""
    base = model.get_base_model()
    embedding = base.get_input_embeddings()
    return base.get_output_embeddings().weight is getattr(embedding, "base_layer", embedding).weight


def status(subject: Subject) -> None:
    """`get_model_status`, `get_layer_status`"""
    model = subject.with_other()
    found = model.get_model_status()
    assert found.enabled is True
    assert found.active_adapters == ["default"]
    assert found.available_adapters == ["default", "other"]
    assert found.requires_grad == {"default": True, "other": False}
    assert found.merged_adapters == []
    assert found.trainable_params == model.get_nb_trainable_parameters()[0]
    layers = model.get_layer_status()
    assert len(layers) == found.num_adapter_layers
    assert all(layer.active_adapters == ["default"] for layer in layers)
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def count_parameters(subject: Subject) -> None:
    """`print_trainable_parameters`, `get_nb_trainable_parameters`"""
    model = subject.model()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert model.get_nb_trainable_parameters()[0] == trainable
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} ||" in written.getvalue()


def combine(subject: Subject) -> None:
    """`add_weighted_adapter`: svd, linear, cat, ties, dare, magnitude pruning; negative weights"""
    model = subject.with_other()
    kinds = ("svd", "linear", "cat", "ties", "dare_linear", "magnitude_prune")
    for kind in kinds:
        density = {"density": 0.5} if kind in ("ties", "dare_linear", "magnitude_prune") else {}
        model.add_weighted_adapter(["default", "other"], [0.7, 0.3], kind, combination_type=kind, **density)
        model.set_adapter(kind)
        assert subject.logits(model.eval()).isfinite().all()
    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "less", combination_type="linear")
    model.set_adapter("less")
    assert subject.logits(model.eval()).isfinite().all()
    for name in ("svd", "cat"):  # the exact ones; of one adapter alone
        model.set_adapter("default")
        expected = subject.logits(model.eval())
        model.add_weighted_adapter(["default", "other"], [1.0, 0.0], f"{name} alone", combination_type=name)
        model.set_adapter(f"{name} alone")
        subject.check_alike(subject.logits(model.eval()), expected)
    tolerance = 1e-2 if subject.case.format == "bf16" else 1e-4
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers[:2]:
        parts = [layer.get_delta_weight(name).float() for name in ("default", "other", "cat")]
        torch.testing.assert_close(parts[2], 0.7 * parts[0] + 0.3 * parts[1], atol=tolerance, rtol=tolerance)
    if not subject.is_stock:
        rows = [model.base_model.memory.rows(name) for name in ("default", "other", "svd", "less")]
        torch.testing.assert_close(rows[2], 0.7 * rows[0] + 0.3 * rows[1])
        torch.testing.assert_close(rows[3], rows[0] - 0.5 * rows[1])


def mix_in_a_pass(subject: Subject) -> None:
    """`adapter_names=` in a forward pass"""
    model = subject.with_other()
    batch = subject.batch()
    mixed = subject.logits(model, batch, adapter_names=["other", "default"])
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        expected = subject.logits(model.eval(), {key: value[row : row + 1] for key, value in batch.items()})
        kept = batch["attention_mask"][:row].sum()
        subject.check_alike(mixed[kept : kept + len(expected)], expected)


def mix_in_generate(subject: Subject) -> None:
    """`adapter_names=` in `generate`, `__base__` among them, beams too"""
    model = subject.with_other(num_blocks=3)

    def check(call: Any, **options: Any) -> None:
        model.set_adapter("default")
        mixed = call(model.eval(), adapter_names=["other", "__base__"], **options).float()
        model.set_adapter("other")
        subject.check_alike(mixed[0], call(model.eval(), **options)[0].float())
        with model.disable_adapter():
            subject.check_alike(mixed[1], call(model, **options)[1].float())

    check(subject.next_logits)
    if not subject.is_rounded:
        check(subject.generate)
        check(subject.generate, num_beams=2)


def index_layers(subject: Subject) -> None:
    """`layers_to_transform`, `exclude_modules`"""
    targets = ["c_attn", "c_fc"] if subject.case.base.startswith("gpt2") else ["q_proj", "up_proj"]
    model = subject.model(target_modules=targets, layers_to_transform=[1], exclude_modules=".*mlp.*")
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert bool(names) == subject.has_lora
    assert all(".1." in name and "mlp" not in name for name in names)
    assert subject.logits(model).isfinite().all()


def patterns(subject: Subject) -> None:
    """`rank_pattern`, `alpha_pattern`, `init_lora_weights="gaussian"`"""
    pattern = r".*\.1\..*"
    model = subject.model(rank_pattern={pattern: 2}, alpha_pattern={pattern: 6}, init_lora_weights="gaussian")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert {module.r["default"] for name, module in layers.items() if ".1." in name} == {2}
    assert {module.r["default"] for name, module in layers.items() if ".0." in name} == {4}
    assert subject.logits(model).isfinite().all()


def scale(subject: Subject) -> None:
    """`rescale_adapter_scale`"""
    model = subject.model()
    expected = subject.logits(model)
    with rescale_adapter_scale(model, 0.5):
        assert not torch.allclose(subject.logits(model), expected)
    torch.testing.assert_close(subject.logits(model), expected, atol=0, rtol=0)


def save_other_modules(subject: Subject) -> None:
    """`modules_to_save`: another layer trained in full"""
    norm = "ln_f" if subject.case.base.startswith("gpt2") else "model.norm"
    model = subject.model(modules_to_save=[norm])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                assert parameter.requires_grad
                parameter.add_(0.5)
    folder = str(subject.folder / "adapter")
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(subject.base(), folder)
    torch.testing.assert_close(subject.logits(loaded), subject.logits(model), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        plain = subject.plain_logits(model)
    assert not torch.allclose(plain, subject.plain_logits(model))


def start_from_activations(subject: Subject) -> None:
    """`init_lora_weights="eva"`, `initialize_lora_eva_weights`"""
    targets = ["c_attn"] if subject.case.base.startswith("gpt2") else ["q_proj", "v_proj"]
    model = subject.model(is_fresh=True, target_modules=targets, init_lora_weights="eva")
    with model.disable_adapter():
        expected = subject.plain_logits(model)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(6, 250, (2, 12)), "attention_mask": torch.ones(2, 12)} for _ in range(4)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    subject.check_alike(subject.plain_logits(model), expected)  # B is zero
    pretend_training(model)
    folder = str(subject.folder / "adapter")
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(subject.base(), folder)
    subject.check_alike(subject.logits(loaded), subject.logits(model))


BEHAVIOURS = (
    add_set_and_delete,
    only_the_active_adapter_trains,
    a_fresh_adapter_changes_nothing,
    disable,
    unload,
    status,
    count_parameters,
    combine,
    mix_in_a_pass,
    mix_in_generate,
    index_layers,
    patterns,
    scale,
    save_other_modules,
    start_from_activations,
)
