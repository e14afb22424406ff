"""Load an exported folder as a plain model that answers questions as its users ask them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rim_peft.data.chat_templates import check_chat_template
from rim_peft.data.examples import Question, QuestionError, Templates
from rim_peft.export.record import EXPORT_FILE, ExportRecord, read_record
from rim_peft.inference.greedy import PlainAnswerer
from rim_peft.tuner.files import brief
from rim_peft.tuner.tensors import AGAIN


def is_export(folder: Path) -> bool:
    """Return whether an export wrote a folder."""
    return (folder / EXPORT_FILE).is_file()


def load_export(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, PreTrainedTokenizerBase, ExportRecord]:
    """Load a merged export with plain transformers: model, tokenizer and record.

    Args:
        trust_remote_code: run code that comes with its model or tokenizer.

    Raises:
        ValueError: the export has another format, or its files are damaged or belong to another export.
    """
    record = read_record(folder)
    trusted = {"trust_remote_code": trust_remote_code}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **trusted)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **trusted)
    except Exception as error:  # from several libraries, one of which raises a bare `Exception`
        raise ValueError(
            f"{folder}: must hold a model and a tokenizer that transformers can load, and does not "
            f"({brief(error)}). {AGAIN}"
        ) from error
    check_chat_template(tokenizer, str(folder))
    model, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: its weights must be complete, but lack {lacking[0]} (of {len(lacking)}). {AGAIN}")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, tokenizer, record


class ExportAnswerer(PlainAnswerer):
    """Answers as the adapter does, with a plain model and the blocks that its tokenizer appends."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        record: ExportRecord,
        templates: Templates | None = None,
        num_blocks: int | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Initialise the answerer.

        Args:
            num_blocks: must be the export's own number.

        Raises:
            ValueError: ``num_blocks`` differs from the export's, or a number is out of range.
        """
        super().__init__(model, tokenizer, templates=templates, max_new_tokens=max_new_tokens)
        self.record = record
        own = record.memory.num_blocks
        if num_blocks not in (None, own):
            raise ValueError(
                f"num_blocks: must be {own}, which the export was made with, got {num_blocks!r}. Export the adapter "
                "again with another number (--num-blocks)."
            )

    @property
    def num_rows(self) -> int:
        """Rows of the model's embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def suppressed(self) -> list[int]:
        """The export's memory tokens."""
        return list(self.record.memory.ids)

    @property
    def num_blocks(self) -> int:
        """Blocks that the tokenizer appends."""
        return self.record.memory.num_blocks

    def _tokenize_prompts(self, questions: Sequence[Question], name: str) -> list[list[int]]:
        """Return the prompts' ids with their blocks, which the tokenizer or the chat template appends.

        Raises:
            ValueError: as for :meth:`Answerer.tokenize`.
            QuestionError: a question holds memory tokens.
        """
        memory = self.record.memory
        prompts = super()._tokenize_prompts(questions, name)
        for index, (question, ids) in enumerate(zip(questions, prompts, strict=True)):
            if isinstance(question, str) or not self.record.places["chat"]:
                ids.extend(memory.block_ids)
            start = len(ids) - len(memory.block_ids)
            if ids[start:] != memory.block_ids or any(token in memory.ids for token in ids[:start]):
                problem = "must not spell the export's memory tokens. Leave allow_special_tokens off"
                raise QuestionError(index, problem, name)
        return prompts
