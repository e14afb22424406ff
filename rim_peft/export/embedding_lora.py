"""Write an adapter as plain LoRA for the base as it is: memory rows become LoRA on the input embedding.

A LoRA on the embedding adds ``B @ A[:, id]`` to a token's row. At three ids that no text uses, the export sets it to
the difference between a memory row and the base's own row there; all other ids stay as they are. Every layer's scaling
is folded into its B, and every rank is padded with zeros to one that engines take, so that the configuration is plain::

    lora_embedding_A[j, id_j] = 1        lora_embedding_B[:, j] = row_j - E[id_j]        r = lora_alpha

The folder is an adapter's, with a tokenizer that appends the blocks and a record. The base is not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rim_peft.export.card import render_adapter_card
from rim_peft.export.checking import CheckResult, Exported, check, raise_if_differing
from rim_peft.export.folder import ExportOptions, Prompts, check_new, written_at_once
from rim_peft.export.peft_lora import write_adapter
from rim_peft.export.record import EXPORT_FILE, new_record, write_json
from rim_peft.export.spare_ids import check_unused, find_spare_ids, name_spare_ids
from rim_peft.export.tokens import MemoryTokens, append_blocks, set_variables
from rim_peft.export.weights import (
    adapter_state,
    as_plain,
    free,
    is_tied,
    memory_rows,
    on_stored_base,
    quantization_of,
    stored_at,
)
from rim_peft.tuner.bases import commit_of
from rim_peft.tuner.config import RiMConfig, active_config
from rim_peft.tuner.files import file_digests

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for (``--max-lora-rank``)."""

_INEXPRESSIBLE = {
    "use_dora": "DoRA also scales by the norm of merged weights",
    "lora_bias": "biases are not part of plain LoRA",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA has another layout",
    "target_parameters": "engines read LoRA of layers, not of parameters",
    "modules_to_save": "whole layers are not LoRA",
}
_FORBIDDEN = -100.0
"""The lowest ``logit_bias`` that engines take."""


def export_embedding_lora(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    prompts: Prompts,
    options: ExportOptions,
    *,
    source: str,
) -> CheckResult:
    """Write a plain LoRA adapter for the unmodified base. The model is consumed by this call.

    Args:
        options: how to write it; ``dtype`` is the type of the adapter's own weights, float32 by default.

    Raises:
        ValueError: plain LoRA cannot express the adapter, the base has no unused ids, or ``folder`` is in use.
        ExportCheckError: the export answers differently from the adapter.
    """
    check_new(folder)
    config, rows = active_config(model), memory_rows(model)
    _check_expressible(config, model)
    rank = padded_rank(model)
    loaded: Any = model.get_base_model()
    base_name, place, revision = loaded.name_or_path, stored_at(loaded), commit_of(loaded)
    model = on_stored_base(model) if quantization_of(model) is None else model
    ids = find_spare_ids(tokenizer, model.get_base_model(), options.spare_ids)
    num_blocks = options.blocks_of(config)
    extended, memory = name_spare_ids(tokenizer, ids, num_blocks=num_blocks, block_size=config.block_size)
    plain = as_plain(model, tokenizer, prompts, num_blocks=num_blocks, unquantized=on_stored_base)
    check_unused(memory, [text for item in plain.expected for text in (item.ids, item.answer)])
    set_variables(extended, prompts.templates.chat_template_kwargs)
    places = append_blocks(extended, memory, options.append_to)
    dtype = options.dtype_of(torch.float32)
    state = {key: value.to(dtype) for key, value in plain_lora(plain.model, rows, ids, rank=rank).items()}
    lora = _plain_config(plain.model, config, rank=rank, base=base_name, revision=config.revision or revision)
    entry: dict[str, Any] = {
        **new_record("embedding-lora"),
        "source": source,
        "base": base_name,
        "base_revision": revision,
        **_how_to_ask(memory, tokenizer),
        "places": places,
        **prompts.to_dict(),
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "head_is_tied": is_tied(plain.model.get_base_model()),
        "quantized_in_training": plain.quantization,
        "quantized_agreement": plain.agreement,
    }
    free(plain.model)
    with written_at_once(folder, last=EXPORT_FILE) as staging:
        write_adapter(staging, state, lora, extended)
        settings = {"suppress_tokens": memory.ids}
        exported = Exported(place, staging, places, dtype, adapter=staging, settings=settings, revision=revision)
        result = check(plain.expected, tokenizer, memory, exported, max_new_tokens=prompts.max_new_tokens)
        knows_names = entry["base_tokenizer_knows_blocks"]
        card = render_adapter_card(
            folder.name, memory, prompts, result, places=places, base=base_name, knows_names=knows_names
        )
        _write_papers(staging, card, {**entry, "check": result.to_dict()})
    raise_if_differing(result, options, folder, head_is_tied=False)
    return result


def _write_papers(folder: Path, card: str, record: dict[str, Any]) -> None:
    """Write the card, and the record with the hashes of all files."""
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = file_digests(folder, [path.name for path in folder.iterdir()])
    write_json(folder / EXPORT_FILE, {**record, "files": files})


def _how_to_ask(memory: MemoryTokens, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the record's keys for clients that append blocks themselves."""
    return {
        "memory": memory.to_dict(),
        "block_text": memory.block_text,
        "block_ids": memory.block_ids,
        "base_tokenizer_knows_blocks": set(memory.names) <= set(tokenizer.get_vocab()),
        "logit_bias": {str(index): _FORBIDDEN for index in memory.ids},
    }


def plain_lora(model: PeftModel, rows: Tensor, ids: Sequence[int], *, rank: int) -> dict[str, Tensor]:
    """Return an adapter as plain LoRA with scaling 1, memory rows included, by names in an adapter's file.

    Args:
        model: a model with an active RIM adapter, on plain weights.
        rows: (3, H) memory rows.
        ids: ids that get them.
        rank: rank of every layer, at least the largest one of the adapter.

    Returns:
        float32 tensors on the CPU: A of (rank, in) and B of (out, rank) for each layer, and for the embedding A of
        (rank, V) and B of (H, rank).
    """
    adapter = str(model.active_adapter)
    state: dict[str, Tensor] = {}
    for name, layer in _lora_layers(model).items():
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
        more = rank - down.shape[0]
        state[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, more))
        state[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(up, (0, more))
    base: Any = model.get_base_model()
    embedding = base.get_input_embeddings()
    matrix = embedding.weight.detach().float().cpu()
    down, up = torch.zeros(rank, len(matrix)), torch.zeros(matrix.shape[1], rank)
    for place, (index, row) in enumerate(zip(ids, rows, strict=True)):
        down[place, index] = 1
        up[:, place] = row - matrix[index]
    prefix = f"base_model.model.{_embedding_name(model)}"
    state |= {f"{prefix}.lora_embedding_A": down, f"{prefix}.lora_embedding_B": up}
    return {key: value.detach().float().cpu().contiguous() for key, value in state.items()}


def _plain_config(model: PeftModel, config: RiMConfig, *, rank: int, base: str, revision: str | None) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_target_modules(model),
        fan_in_fan_out=config.fan_in_fan_out,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )


def padded_rank(model: PeftModel) -> int:
    """Return the smallest rank of ``RANKS`` that has room for every layer of the active adapter.

    Raises:
        ValueError: there is none.
    """
    adapter = str(model.active_adapter)
    largest = max((layer.lora_A[adapter].weight.shape[0] for layer in _lora_layers(model).values()), default=1)
    for rank in RANKS:
        if largest <= rank:
            return rank
    raise ValueError(
        f"r: must be at most {RANKS[-1]} for the format embedding-lora, the largest rank that engines take, got "
        f"{largest}. Use format merged."
    )


def _check_expressible(config: RiMConfig, model: PeftModel) -> None:
    base: Any = model.get_base_model()
    if not base.name_or_path:
        raise ValueError(
            "base: must be loaded from a folder or the Hub, where engines find it too, got one built in memory. Save "
            "it, and load it from there."
        )
    for name, reason in _INEXPRESSIBLE.items():
        if value := getattr(config, name, None):
            raise ValueError(
                f"{name}: must be off for the format embedding-lora, got {value!r}: {reason}. Use format merged."
            )
    known = (".lora_A.weight", ".lora_B.weight")
    if other := [key for key in adapter_state(model) if not key.endswith(known) and "lora_rim_memory" not in key]:
        raise ValueError(
            f"adapter: must have LoRA matrices and memory rows alone for the format embedding-lora, got {other[0]}. "
            "Use format merged."
        )


def _lora_layers(model: PeftModel) -> dict[str, Any]:
    """Return the active adapter's LoRA layers by their names in the base."""
    adapter, base = str(model.active_adapter), model.get_base_model()
    modules = base.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer) and adapter in module.lora_A}


def _embedding_name(model: PeftModel) -> str:
    """Return the name of the base's input embedding."""
    tuner: Any = model.base_model
    return next(name for name, module in tuner.model.named_modules() if module is tuner.memory)


def _target_modules(model: PeftModel) -> list[str]:
    """Return the last parts of the layers' names, or their full names if other layers share a last part."""
    tuner: Any = model.base_model
    names = {*_lora_layers(model), _embedding_name(model)}
    last = {name.rpartition(".")[2] for name in names}
    everywhere = {name for name, _ in tuner.model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if everywhere == names else names)
