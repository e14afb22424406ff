"""An exported folder → a plain model that answers questions as its users ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rim_peft.data.chat_templates import check_chat_template
from rim_peft.data.examples import Question, Templates, check_question
from rim_peft.export.record import EXPORT_FILE, ExportRecord, read_record
from rim_peft.inference.decoding import check_number
from rim_peft.inference.generation import generate_greedily
from rim_peft.inference.readout import read_texts


def is_export(folder: Path) -> bool:
    """Return whether a folder was written by an export."""
    return (folder / EXPORT_FILE).is_file()


def load_export(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[Any, PreTrainedTokenizerBase, AnswerExported]:
    """Load a merged export with plain transformers: model, tokenizer, and how to ask them.

    Args:
        folder: of the export.
        trust_remote_code: let code run that comes with its model or tokenizer.

    Raises:
        ValueError: it is an export of another format.
    """
    record = read_record(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    check_chat_template(tokenizer, str(folder))
    return model, tokenizer, AnswerExported(record)


@dataclass(frozen=True)
class AnswerExported:
    """Answers as ``answer_questions`` gives them, from a plain model and the blocks that its tokenizer appends."""

    record: ExportRecord

    def __call__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        *,
        templates: Templates | None = None,
        num_blocks: int | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        on_cut: Callable[[str], None] | None = None,
    ) -> Iterator[str]:
        """Answer questions greedily, one text per question, in their order.

        Raises:
            ValueError: ``num_blocks`` is not what the export was made with, or a number is out of range.
        """
        memory = self.record.memory
        if num_blocks not in (None, memory.num_blocks):
            raise ValueError(
                f"num_blocks: must be {memory.num_blocks}, which the export was made with, got {num_blocks!r}. Export "
                "the adapter again with another number (--blocks)."
            )
        check_number("batch_size", batch_size, least=1)
        eos_id: int = tokenizer.eos_token_id
        prompts = [self.prompt_ids(tokenizer, question, templates or Templates()) for question in questions]
        for start in range(0, len(prompts), batch_size):
            answers = generate_greedily(
                model,
                prompts[start : start + batch_size],
                eos_id=eos_id,
                pad_id=eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                max_new_tokens=max_new_tokens,
                suppress_tokens=memory.ids,
            )
            yield from read_texts(tokenizer, answers, on_cut=on_cut)

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, question: Question, templates: Templates) -> list[int]:
        """Return a prompt's ids with its blocks, which the tokenizer appends where the export says so."""
        check_question(question)
        if isinstance(question, str):
            kind, ids = "prompt", tokenizer(templates.prompt.format(question=question))["input_ids"]
        else:
            chat = [dict(message) for message in question]
            kind = "chat"
            rendered: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            ids = rendered["input_ids"]
        return list(ids) if self.record.places[kind] else [*ids, *self.record.memory.block_ids]
