"""A model's and a tokenizer's files, written so that older readers find what they look for too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rim_peft.escaping import json_text
from rim_peft.tuner.tensors import not_finite

_READ_AS_IT_IS = "PreTrainedTokenizerFast"
"""The tokenizer class that takes ``tokenizer.json`` as it is; those of single models build a post-processor anew."""

_KEPT_SETTINGS = ("bos_token_id", "pad_token_id", "suppress_tokens", "max_length", "max_new_tokens")


def save_model(model: PreTrainedModel, folder: Path, *, eos_id: int, max_shard_size: str) -> None:
    """Write weights (safetensors), configuration and generation settings.

    Of the base's settings its special tokens, lengths and suppressed tokens stay: many a base samples or penalises
    repetition, while an export is checked, and its adapter judged, by greedy search. Generation stops at ``eos_id``,
    which closes every trained readout, besides where the base stopped.

    Raises:
        ValueError: a weight is not finite in the type that is written.
    """
    if (found := not_finite(dict(model.named_parameters()))) is not None:
        raise ValueError(
            f"dtype: weights must be finite in the type that is written, {found} as {model.dtype}. Export with --dtype "
            "bfloat16 or float32, which reach further than float16."
        )
    settings = model.generation_config
    if settings is not None:
        known = settings.eos_token_id
        stops = known if isinstance(known, list) else [] if known is None else [known]
        kept = {name: value for name in _KEPT_SETTINGS if (value := getattr(settings, name, None)) is not None}
        kept["eos_token_id"] = known if eos_id in stops else [*stops, eos_id] if stops else eos_id
        model.generation_config = GenerationConfig(**kept)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _edit(folder / "config.json", _add_older_names)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer whose files are read as they are, by transformers 4 too."""
    tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", _make_plain)


def _make_plain(config: dict[str, Any]) -> None:
    for loaded_how in ("is_local", "local_files_only"):
        config.pop(loaded_how, None)
    config.update(tokenizer_class=_READ_AS_IT_IS, model_input_names=["input_ids", "attention_mask"])


def _add_older_names(config: dict[str, Any]) -> None:
    """Add the names that transformers 4 and engines that follow it read: ``rope_theta``, ``torch_dtype``, and so on.

    Without them, they would silently rotate by another frequency.
    """
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if "dtype" in part:
            part.setdefault("torch_dtype", part["dtype"])
        ropes: dict[str, Any] = part.get("rope_parameters") or {}
        rope: dict[str, Any] = ropes.get("full_attention", ropes)  # some have one for each kind of layer
        if "rope_theta" in rope:
            part.setdefault("rope_theta", rope["rope_theta"])
            if rope.get("rope_type", "default") != "default":
                part.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
        if "sliding_attention" in ropes:
            part.setdefault("rope_local_base_freq", ropes["sliding_attention"]["rope_theta"])


def _edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")
