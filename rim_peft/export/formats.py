"""Write an adapter as one plain checkpoint, or as plain LoRA on an extended base.

As one checkpoint, LoRA is merged and the memory rows become rows of the model; an adapter without blocks, from a
method that RiM is compared with, is only merged.

As plain LoRA: an engine has one embedding for all adapters, so memory rows become rows of the base. Adapters of one
base have different rows: each gets three tokens of its own, in which the blocks after its prompts are written::

    folder/base/            the base with three more rows per adapter, and a tokenizer that knows their tokens
    folder/adapters/NAME/   LoRA alone, and a tokenizer that appends this adapter's blocks
    folder/rim_export.json
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rim_peft.export.checking import CheckResult, ExportCheckError, check
from rim_peft.export.record import (
    EXPORT_FILE,
    ExportRecord,
    new_record,
    read_export,
    render_adapter_card,
    render_card,
    render_modelfile,
    write_json,
)
from rim_peft.export.tokens import add_memory_tokens, append_blocks, save_model, save_tokenizer, set_variables
from rim_peft.export.weights import (
    STAGING,
    ExportOptions,
    Prompts,
    add_rows,
    as_plain,
    check_new,
    clear_unfinished,
    free,
    is_tied,
    memory_rows,
    merged,
    written_at_once,
)
from rim_peft.tuner.config import RiMConfig, active_config
from rim_peft.tuner.files import file_digests

_SHOWN_PROMPTS = 5


def export_merged(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    prompts: Prompts,
    options: ExportOptions,
    *,
    source: str,
    papers: Mapping[str, str] = MappingProxyType({}),
    noted: Mapping[str, Any] = MappingProxyType({}),
) -> CheckResult:
    """Write a plain checkpoint and check it in a fresh process. The model is consumed by this call.

    The folder holds weights, configuration, generation settings, a tokenizer that appends the blocks, a card and
    ``rim_export.json``. A failed check removes nothing.

    Args:
        folder: where to write; new or empty.
        papers: texts of additional files by name, such as its recipe.
        noted: additional keys of the record.

    Raises:
        ValueError: the adapter or base cannot be written as a plain checkpoint, or ``folder`` is in use.
        ExportCheckError: the export answers differently from the adapter.
    """
    check_new(folder)
    config = active_config(model)
    rows = memory_rows(model) if config.num_blocks else None
    if rows is None and options.num_blocks is not None:
        raise ValueError(
            f"num_blocks: must be left out for an adapter without blocks, got {options.num_blocks} (--num-blocks)."
        )
    num_blocks = options.blocks_of(config)
    extended, memory = add_memory_tokens(tokenizer, num_blocks=num_blocks, block_size=config.block_size)
    set_variables(extended, prompts.templates.chat_template_kwargs)
    places = append_blocks(extended, memory, options.append_to)
    base_name = config.base_model_name_or_path
    plain = as_plain(model, tokenizer, prompts, num_blocks=num_blocks)
    dtype = options.dtype_of(plain.dtype)
    base: Any = merged(plain.model).to(dtype)
    if rows is not None:
        add_rows(base, memory.ids, rows, keep_tied=options.keep_tied)
    record = ExportRecord(
        memory=memory,
        places=places,
        source=source,
        base=base_name,
        dequantized_from=plain.quantization,
        dtype=str(dtype).removeprefix("torch."),
        head_is_tied=is_tied(base),
    )
    with written_at_once(folder, last=EXPORT_FILE) as staging:
        save_model(base, staging, eos_id=tokenizer.eos_token_id, max_shard_size=options.max_shard_size)
        save_tokenizer(extended, staging)
        free(base)
        result = check(
            plain.expected,
            tokenizer,
            memory,
            places=places,
            dtype=dtype,
            model=staging,
            tokenizer_folder=staging,
            max_new_tokens=prompts.max_new_tokens,
        )
        files = file_digests(staging, [path.name for path in staging.iterdir()])
        record.write(staging, check=result.to_dict(), quantized_agreement=plain.agreement, files=files, **noted)
        (staging / "README.md").write_text(render_card(folder, record, prompts, result), encoding="utf-8")
        if (modelfile := render_modelfile(memory, prompts, str(tokenizer.eos_token))) is not None:
            (staging / "Modelfile").write_text(modelfile, encoding="utf-8")
        for name, text in papers.items():
            (staging / name).write_text(text, encoding="utf-8")
    raise_if_differing(result, options, folder, head_is_tied=record.head_is_tied)
    return result


def raise_if_differing(result: CheckResult, options: ExportOptions, folder: Path, *, head_is_tied: bool) -> None:
    """Raise if an export answers too many prompts with other tokens than the plugin.

    Raises:
        ExportCheckError: it does.
    """
    num_wrong = result.num_wrong(head_is_tied=head_is_tied)
    if num_wrong <= options.max_differing:
        return
    shown = "\n".join(f"  {line}" for line in result.differing[:_SHOWN_PROMPTS])
    raise ExportCheckError(
        f"{folder}: must give the adapter's greedy tokens, and differs on {num_wrong} of {result.num_prompts} prompts, "
        f"near ties aside:\n{shown}\nThe files are kept. If rounding is the cause, use --dtype float32; to accept it, "
        "use --max-differing."
    )


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
        source: the adapter's name; its last part names the adapter in the folder.

    Raises:
        ValueError: the adapter has no LoRA, or has more than memory rows and LoRA; its name is taken; the folder holds
            another base or something else.
        ExportCheckError: the export answers differently from the adapter.
    """
    record = _open(folder)
    name = Path(source).resolve().name
    if "check" in record["adapters"].pop(name, ()):
        raise ValueError(f"out: {folder} already has an adapter {name!r}. Rename the folder of the new one.")
    rows, config = memory_rows(model), active_config(model)
    lora = plain_config(config, base=folder / BASE)
    num_blocks = options.blocks_of(config)
    plain = as_plain(model, tokenizer, prompts, num_blocks=num_blocks)
    base, state = _taken_apart(plain.model)
    dtype = options.dtype_of(plain.dtype)
    base = base.to(dtype)
    known: PreTrainedTokenizerBase = tokenizer
    keep_tied = options.keep_tied
    if record["adapters"]:
        keep_tied = bool(record["head_is_tied"])  # untying now would make the head prefer the rows that exist
        base = _extended_so_far(folder / BASE, base)
        known = AutoTokenizer.from_pretrained(str(folder / BASE), trust_remote_code=False)
    extended, memory = add_memory_tokens(known, num_blocks=num_blocks, block_size=config.block_size)
    add_rows(base, memory.ids, rows, keep_tied=keep_tied)
    head_is_tied = is_tied(base)
    (folder / STAGING).mkdir(parents=True, exist_ok=True)  # marks an unfinished export
    _replace_base(folder / BASE, base, extended, eos_id=tokenizer.eos_token_id, max_shard_size=options.max_shard_size)
    free(base)
    adapter = folder / ADAPTERS / name
    set_variables(extended, prompts.templates.chat_template_kwargs)
    places = append_blocks(extended, memory, options.append_to)
    write_adapter(adapter, state, lora, extended)
    entry: dict[str, Any] = {
        "memory": memory.to_dict(),
        "block_text": memory.block_text,
        "places": places,
        "source": source,
        "rank": lora.r,
        **prompts.to_dict(),
        "dequantized_from": plain.quantization,
        "quantized_agreement": plain.agreement,
    }
    result = check(
        plain.expected,
        tokenizer,
        memory,
        places=places,
        dtype=dtype,
        model=folder / BASE,
        tokenizer_folder=adapter,
        adapter=adapter,
        max_new_tokens=prompts.max_new_tokens,
    )
    entry["check"] = result.to_dict()
    record["adapters"][name] = entry
    record["head_is_tied"] = head_is_tied
    (adapter / "README.md").write_text(render_adapter_card(name, memory, prompts, result), encoding="utf-8")
    write_json(folder / EXPORT_FILE, record)
    clear_unfinished(folder)
    raise_if_differing(result, options, folder, head_is_tied=head_is_tied)
    return result


def _taken_apart(model: PeftModel) -> tuple[Any, dict[str, Tensor]]:
    """Return an adapter's base, and its LoRA weights by their names in an adapter's file."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    lora = {key: value.detach().cpu().contiguous() for key, value in state.items() if _MEMORY not in key}
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


def _open(folder: Path) -> dict[str, Any]:
    """Return the record of a folder; a new one if it is empty or holds only the remains of a killed export.

    Raises:
        ValueError: the folder holds something else.
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
    return record


def _beside(name: str) -> tuple[str, str]:
    """Return the names of a folder while it is written, and while another one replaces it."""
    return f"{name}.partial", f"{name}.old"


def _extended_so_far(folder: Path, base: PreTrainedModel) -> Any:
    """Load the extended base of earlier adapters, which must be the new adapter's base with additional rows.

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
    return extended


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
