"""Write an adapter as plain LoRA on an extended base, which further adapters can share.

An engine has one embedding for all adapters, so memory rows become rows of the base. Adapters of one base have
different rows: each gets three tokens of its own, in which the blocks after its prompts are written::

    folder/base/            the base with three more rows per adapter, and a tokenizer that knows their tokens
    folder/adapters/NAME/   LoRA alone, and a tokenizer that appends this adapter's blocks
    folder/rim_export.json
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rim_peft.export.card import render_adapter_card
from rim_peft.export.checking import CheckResult, Exported, check, raise_if_differing
from rim_peft.export.folder import STAGING, ExportOptions, Prompts, check_new, clear_unfinished
from rim_peft.export.record import EXPORT_FILE, new_record, read_export, write_json
from rim_peft.export.tokens import (
    add_memory_tokens,
    append_blocks,
    save_model,
    save_tokenizer,
    set_variables,
    with_tokens_of,
)
from rim_peft.export.weights import adapter_state, add_rows, as_plain, free, is_tied, memory_rows
from rim_peft.tuner.config import RiMConfig, active_config

BASE, ADAPTERS = "base", "adapters"

_MEMORY = "lora_rim_memory"


def export_peft_lora(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    prompts: Prompts,
    options: ExportOptions,
    *,
    source: str,
) -> CheckResult:
    """Write an extended base and a plain LoRA adapter, or add an adapter to them. The model is consumed by this call.

    Args:
        folder: new or empty, or the result of an earlier call for another adapter of the same base.
        source: its last part names the adapter in the folder.

    Raises:
        ValueError: the adapter has no LoRA, or has more than memory rows and LoRA; its name is taken; the folder holds
            another base or tokenizer, or something else.
        ExportCheckError: the export answers differently from the adapter.
    """
    name = Path(source).resolve().name
    record = _open(folder, name)
    rows, config = memory_rows(model), active_config(model)
    lora = plain_config(config, base=folder / BASE)
    num_blocks = options.blocks_of(config)
    plain = as_plain(model, tokenizer, prompts, num_blocks=num_blocks)
    base, state = _taken_apart(plain.model)
    base = base.to(dtype := options.dtype_of(plain.dtype))
    first, keep_tied = tokenizer, options.keep_tied
    if record["adapters"]:
        keep_tied = bool(record["head_is_tied"])  # untying now would make the head prefer the rows that exist
        base, first = _extended_so_far(folder / BASE, base)
        tokenizer = with_tokens_of(tokenizer, first)  # its chat template and its tokens before a text are its own
    blocks = {"num_blocks": num_blocks, "block_size": config.block_size}
    (extended, memory), (beside, _) = (add_memory_tokens(one, **blocks) for one in (tokenizer, first))
    add_rows(base, memory.ids, rows, keep_tied=keep_tied)
    record["head_is_tied"] = is_tied(base)
    (folder / STAGING).mkdir(parents=True, exist_ok=True)  # marks an unfinished export
    _replace_base(folder / BASE, base, beside, eos_id=tokenizer.eos_token_id, max_shard_size=options.max_shard_size)
    free(base)
    adapter = folder / ADAPTERS / name
    set_variables(extended, prompts.templates.chat_template_kwargs)
    places = append_blocks(extended, memory, options.append_to)
    write_adapter(adapter, state, lora, extended)
    exported = Exported(folder / BASE, adapter, places, dtype, adapter=adapter)
    result = check(plain.expected, tokenizer, memory, exported, max_new_tokens=prompts.max_new_tokens)
    record["adapters"][name] = {
        "memory": memory.to_dict(),
        "block_text": memory.block_text,
        "places": places,
        "source": source,
        "rank": lora.r,
        **prompts.to_dict(),
        "dequantized_from": plain.quantization,
        "quantized_agreement": plain.agreement,
        "check": result.to_dict(),
    }
    card = render_adapter_card(name, memory, prompts, result, places=places)
    (adapter / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / EXPORT_FILE, record)
    clear_unfinished(folder)
    raise_if_differing(result, options, folder, head_is_tied=record["head_is_tied"])
    return result


def _taken_apart(model: PeftModel) -> tuple[Any, dict[str, Tensor]]:
    """Return an adapter's base, and its LoRA weights by their names in an adapter's file."""
    lora = {key: value.contiguous() for key, value in adapter_state(model).items() if _MEMORY not in key}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.unload(), lora


def write_adapter(
    folder: Path, lora: dict[str, Tensor], config: LoraConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a plain LoRA adapter, over what an interrupted export may have left."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    save_tokenizer(tokenizer, folder)


def plain_config(config: RiMConfig, *, base: Path) -> LoraConfig:
    """Return an adapter's LoRA options for stock PEFT.

    Raises:
        ValueError: there is no LoRA, or whole layers were trained, which the extended base cannot hold.
    """
    if config.r == 0:
        raise ValueError("r: must be at least 1 for the format peft-lora, got 0: there is no LoRA. Use format merged.")
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save: must be empty for the format peft-lora, got {config.modules_to_save!r}: engines with "
            "many adapters do not support it. Use format merged."
        )
    names = {field.name for field in dataclasses.fields(LoraConfig)} - {"peft_type", "base_model_name_or_path"}
    values = {name: value for name, value in config.to_dict().items() if name in names}
    values["inference_mode"] = True
    return LoraConfig(base_model_name_or_path=str(base.resolve()), **values)


def _open(folder: Path, name: str) -> dict[str, Any]:
    """Return the record of a folder; a new one if it is empty or holds only the remains of a killed export.

    Args:
        name: of the adapter that comes into it; what a killed export noted of it is left out.

    Raises:
        ValueError: the folder holds something else, or already has an adapter of that name.
    """
    if not (folder / EXPORT_FILE).is_file():
        if (folder / STAGING).exists():
            for name in (BASE, *_beside(BASE), ADAPTERS):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / f".{EXPORT_FILE}.partial").unlink(missing_ok=True)
            clear_unfinished(folder)
        check_new(folder)
        return {**new_record("peft-lora"), "adapters": {}}
    record = read_export(folder / EXPORT_FILE)
    if record["format"] != "peft-lora":
        raise ValueError(
            f"out: must be new, empty, or an export of format peft-lora to add to, {folder} has format "
            f"{record['format']!r}. Give another folder."
        )
    if "check" in record["adapters"].pop(name, ()):
        raise ValueError(f"out: {folder} already has an adapter {name!r}. Rename the folder of the new one.")
    return record


def _beside(name: str) -> tuple[str, str]:
    """Return the names of a folder while it is written, and while another one replaces it."""
    return f"{name}.partial", f"{name}.old"


def _extended_so_far(folder: Path, base: PreTrainedModel) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the extended base of earlier adapters and its tokenizer; it must be this base with additional rows.

    Raises:
        ValueError: it is another base.
    """
    old = folder.with_name(_beside(folder.name)[1])
    if old.exists() and not folder.exists():  # killed between two renames
        old.rename(folder)
    extended: Any = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False)
    extended.to(base.device)
    theirs, ours = extended.state_dict(), base.state_dict()
    for name, value in ours.items():
        found = theirs.get(name)
        if found is None or found.dtype != value.dtype or not torch.equal(found[: len(value)], value):
            raise ValueError(
                f"base: must be the one that {folder} was made from, differs in {name}. Export this adapter into "
                "another folder."
            )
    return extended, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _replace_base(
    folder: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, eos_id: int, max_shard_size: str
) -> None:
    """Write the base beside the existing one and replace that when it is complete."""
    partial, old = (folder.with_name(name) for name in _beside(folder.name))
    for left_behind in (partial, old):
        shutil.rmtree(left_behind, ignore_errors=True)
    save_model(base, partial, eos_id=eos_id, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
