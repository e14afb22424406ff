"""An adapter as one plain checkpoint: LoRA merged, memory rows in the vocabulary, blocks from the tokenizer.

One without blocks, as of a method that RiM is compared with, is LoRA merged and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.export.card import render_card
from rim_peft.export.checking import CheckResult, ExportCheckError, check
from rim_peft.export.options import ExportOptions, Prompts, check_new, written_at_once
from rim_peft.export.plain import as_plain, free
from rim_peft.export.record import EXPORT_FILE, ExportRecord
from rim_peft.export.saving import save_model, save_tokenizer
from rim_peft.export.tokens import add_memory_tokens, append_blocks
from rim_peft.export.weights import add_rows, is_tied, memory_rows, merged
from rim_peft.tuner.config import active_config
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
    """Write a plain checkpoint, and check it in a fresh process; the model is used up.

    The folder holds weights, configuration, generation settings, a tokenizer that appends the blocks, a card and
    ``rim_export.json``. A check that fails removes nothing.

    Args:
        model: with an active RIM adapter.
        tokenizer: the base's.
        folder: where to write to, new or empty.
        prompts: what to check it on.
        options: how to write it.
        source: the adapter's name, for the record.
        papers: texts of more files by their names, such as its recipe.
        noted: more keys of the record.

    Raises:
        ValueError: adapter or base cannot be written as a plain checkpoint, or ``folder`` is in use.
        ExportCheckError: the export answers otherwise than the adapter.
    """
    check_new(folder)
    config = active_config(model)
    rows = memory_rows(model) if config.num_blocks else None
    if rows is None and options.num_blocks is not None:
        raise ValueError(
            f"num_blocks: must be left out for an adapter without blocks, got {options.num_blocks} (--blocks)."
        )
    num_blocks = options.blocks_of(config)
    extended, memory = add_memory_tokens(tokenizer, num_blocks=num_blocks, block_size=config.block_size)
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
        for name, text in papers.items():
            (staging / name).write_text(text, encoding="utf-8")
    raise_if_differing(result, options, folder, head_is_tied=record.head_is_tied)
    return result


def raise_if_differing(result: CheckResult, options: ExportOptions, folder: Path, *, head_is_tied: bool) -> None:
    """Raise for an export that answers too many prompts with other tokens than the plugin.

    Raises:
        ExportCheckError: it does.
    """
    num_wrong = result.num_wrong(head_is_tied=head_is_tied)
    if num_wrong <= options.max_differing:
        return
    shown = "\n".join(f"  {line}" for line in result.differing[:_SHOWN_PROMPTS])
    raise ExportCheckError(
        f"{folder}: must give the adapter's greedy tokens, and differs on {num_wrong} of {result.num_prompts} prompts, "
        f"near ties aside:\n{shown}\nThe files are kept. If rounding is the cause, --dtype float32 has none of it; "
        "--max-differing accepts so many."
    )
