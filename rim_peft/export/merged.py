"""Write an adapter as one plain checkpoint: LoRA is merged, and the memory rows become rows of the model.

An adapter without blocks, from a method that RiM is compared with, is only merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.export.card import render_card, render_modelfile
from rim_peft.export.checking import CheckResult, Exported, check, raise_if_differing
from rim_peft.export.folder import ExportOptions, Prompts, check_new, written_at_once
from rim_peft.export.record import EXPORT_FILE, ExportRecord
from rim_peft.export.tokens import add_memory_tokens, append_blocks, save_model, save_tokenizer, set_variables
from rim_peft.export.weights import add_rows, as_plain, free, is_tied, memory_rows, merged
from rim_peft.tuner.config import active_config
from rim_peft.tuner.files import file_digests


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
    num_blocks = options.blocks_of(config)
    rows = memory_rows(model) if config.num_blocks else None
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
        exported = Exported(staging, staging, places, dtype)
        result = check(plain.expected, tokenizer, memory, exported, max_new_tokens=prompts.max_new_tokens)
        files = file_digests(staging, [path.name for path in staging.iterdir()])
        record.write(staging, check=result.to_dict(), quantized_agreement=plain.agreement, files=files, **noted)
        texts = {"README.md": render_card(folder, record, prompts, result), **papers}
        if (modelfile := render_modelfile(memory, prompts, str(tokenizer.eos_token))) is not None:
            texts["Modelfile"] = modelfile
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
    raise_if_differing(result, options, folder, head_is_tied=record.head_is_tied)
    return result
