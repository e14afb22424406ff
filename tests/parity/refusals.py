"""What stock LoRA does and RiM refuses, with the error that a user gets and what to do in its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model

from tests.parity.subject import GREEDY, PROMPTS, Subject


@dataclass(frozen=True)
class Refusal:
    """One use that RiM refuses.

    Attributes:
        what: the use.
        run: does it; must work with stock LoRA.
        error: how the error begins.
        instead: what to do.
    """

    what: str
    run: Callable[[Subject], Any]
    error: str
    instead: str


def _attach(**options: Any) -> Callable[[Subject], Any]:
    return lambda subject: subject.model(**options)


def _generate(*, inputs: Callable[[Subject, Any], dict[str, Any]]) -> Callable[[Subject], Any]:
    def run(subject: Subject) -> Any:
        model = subject.model()
        return model.generate(**{**GREEDY, **inputs(subject, model)})

    return run


def _embeddings(subject: Subject, model: Any) -> dict[str, Any]:
    return {"inputs_embeds": model.get_input_embeddings()(PROMPTS[:1]).detach()}


def _assisted(subject: Subject, model: Any) -> dict[str, Any]:
    return {"input_ids": PROMPTS[:1], "assistant_model": subject.base()}


def _looked_up(subject: Subject, model: Any) -> dict[str, Any]:
    return {"input_ids": PROMPTS[:1], "prompt_lookup_num_tokens": 2}


def _on_a_cache(subject: Subject, model: Any) -> dict[str, Any]:
    output = model.generate(PROMPTS[:1], return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([output.sequences, torch.tensor([[90, 91]])], dim=1)
    return {"input_ids": longer, "past_key_values": output.past_key_values}


def _padded_on_the_right(subject: Subject, model: Any) -> dict[str, Any]:
    return {"input_ids": PROMPTS.flip(1), "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}


def _resize(subject: Subject) -> Any:
    return subject.model().resize_token_embeddings(300)


def _activate_two(subject: Subject) -> Any:
    return subject.with_other().base_model.set_adapter(["default", "other"])


def _save_a_pickle(subject: Subject) -> Any:
    return subject.model().save_pretrained(str(subject.folder), safe_serialization=False)


def _swap_by_transformers(subject: Subject) -> Any:
    folder, base = str(subject.folder / "adapter"), subject.base()
    subject.model().save_pretrained(folder)
    base.load_adapter(folder, adapter_name="default")
    return base.load_adapter(folder, adapter_name="default", hotswap=True)


def _mix_methods(subject: Subject) -> Any:
    return get_peft_model(subject.base(), subject.config(), mixed=True)


REFUSALS = (
    Refusal(
        "LoRA on the input embedding",
        _attach(target_modules=["q_proj", "embed_tokens"]),
        "target_modules: must not hold the input embedding",
        "omit it: RiM looks up its memory there",
    ),
    Refusal(
        "LoRA on the output head",
        _attach(target_modules=["q_proj", "lm_head"]),
        "target_modules: must not hold the output head",
        "leave it out, or `all-linear`",
    ),
    Refusal(
        "the input embedding trained in full",
        _attach(modules_to_save=["embed_tokens"]),
        "modules_to_save: must not hold the input embedding",
        "leave it out",
    ),
    Refusal(
        "`trainable_token_indices`",
        _attach(trainable_token_indices=[3, 4]),
        "trainable_token_indices: is not supported by RiM",
        "leave it out",
    ),
    Refusal("`bias`", _attach(bias="lora_only"), "bias: must be 'none'", "leave it out"),
    Refusal(
        "`layer_replication`",
        _attach(layer_replication=[[0, 2], [1, 2]]),
        "layer_replication: is not supported by RiM",
        "leave it out",
    ),
    Refusal(
        "starts that change the base: PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA",
        _attach(init_lora_weights="pissa"),
        "init_lora_weights: must leave the base's weights as they are",
        "`True`, `gaussian`, `orthogonal`, `eva` or `mica`",
    ),
    Refusal(
        "activated LoRA",
        _attach(alora_invocation_tokens=[3]),
        "alora_invocation_tokens: is not supported by RiM",
        "leave it out",
    ),
    Refusal(
        "several adapters active at once",
        _activate_two,
        "adapter_names: RiM has one active adapter at a time",
        "`add_weighted_adapter`, or `adapter_names=` for a batch",
    ),
    Refusal(
        "adapters of several methods on one base (`mixed=True`)",
        _mix_methods,
        "The provided `peft_type` 'RIM' is not compatible with the `PeftMixedModel`",
        "one method a base",
    ),
    Refusal(
        "transformers' own `load_adapter(hotswap=True)`",
        _swap_by_transformers,
        "Hotswapping is currently only supported for LoRA",
        "PEFT's `hotswap_adapter`",
    ),
    Refusal(
        "`save_pretrained(safe_serialization=False)`",
        _save_a_pickle,
        "safe_serialization: must be True",
        "leave it out",
    ),
    Refusal(
        "a vocabulary resized after the adapter was attached",
        _resize,
        "resize_token_embeddings: the vocabulary must keep its size",
        "resize the base first",
    ),
    Refusal(
        "`generate(inputs_embeds=)`",
        _generate(inputs=_embeddings),
        "input_ids: must be given, since blocks are appended as token ids",
        "`input_ids`, or `num_blocks=0`",
    ),
    Refusal(
        "`generate` with an assistant",
        _generate(inputs=_assisted),
        "decoding: RiM generates by greedy search, sampling and beam search",
        "leave it out, or `num_blocks=0`",
    ),
    Refusal(
        "`generate` with prompt look-up",
        _generate(inputs=_looked_up),
        "decoding: RiM generates by greedy search, sampling and beam search",
        "leave it out, or `num_blocks=0`",
    ),
    Refusal(
        "`generate` on an earlier call's cache",
        _generate(inputs=_on_a_cache),
        "past_key_values: must be empty",
        "pass the whole conversation",
    ),
    Refusal(
        "prompts padded on the right",
        _generate(inputs=_padded_on_the_right),
        "attention_mask: prompts must be padded on the left",
        'the tokenizer\'s `padding_side="left"`',
    ),
)


def run(refusal: Refusal, subject: Subject) -> Any:
    """Do what is refused, without the warnings that stock LoRA gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return refusal.run(subject)
