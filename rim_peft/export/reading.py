"""An exported folder → a plain model that answers questions as its users ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rim_peft.data.chat_templates import check_chat_template
from rim_peft.data.examples import Question, QuestionError, Templates
from rim_peft.data.tokenization import padding_id, tokenize_prompts
from rim_peft.export.record import EXPORT_FILE, ExportRecord, read_record
from rim_peft.inference.decoding import check_number, generate_greedily
from rim_peft.inference.readout import read_texts
from rim_peft.tuner.bases import num_positions
from rim_peft.tuner.files import brief
from rim_peft.tuner.tensors import AGAIN


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
        ValueError: it is an export of another format, or its files are damaged or of another one.
    """
    record = read_record(folder)
    trusted = {"trust_remote_code": trust_remote_code}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **trusted)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **trusted)
    except Exception as error:  # of several libraries, one of which raises `Exception` itself
        raise ValueError(
            f"{folder}: must hold a model and a tokenizer that transformers can load, and does not "
            f"({brief(error)}). {AGAIN}"
        ) from error
    check_chat_template(tokenizer, str(folder))
    model, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: its weights must be whole, and lack {lacking[0]} (of {len(lacking)}). {AGAIN}")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
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
        prompts = self.prompt_ids(
            tokenizer, questions, templates or Templates(), model=model, max_new_tokens=max_new_tokens
        )
        for start in range(0, len(prompts), batch_size):
            answers = generate_greedily(
                model,
                prompts[start : start + batch_size],
                eos_id=eos_id,
                pad_id=padding_id(tokenizer, self._num_rows(model)),
                max_new_tokens=max_new_tokens,
                suppress_tokens=memory.ids,
            )
            yield from read_texts(tokenizer, answers, on_cut=on_cut)

    def prompt_ids(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        templates: Templates,
        *,
        model: Any,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Return the prompts' ids with their blocks, which a chat's template appends where the export says so.

        Raises:
            ValueError: as :func:`~rim_peft.data.tokenization.tokenize_prompts`, or a question holds memory tokens or
                leaves no room for its answer.
        """
        memory = self.record.memory
        room = num_positions(model.config)
        prompts = tokenize_prompts(questions, tokenizer, templates, vocab_size=self._num_rows(model))
        for index, (question, ids) in enumerate(zip(questions, prompts, strict=True)):
            if isinstance(question, str) or not self.record.places["chat"]:
                ids.extend(memory.block_ids)
            if ids[len(ids) - len(memory.block_ids) :] != memory.block_ids or any(
                token in memory.ids for token in ids[: len(ids) - len(memory.block_ids)]
            ):
                raise QuestionError(index, "must not spell the export's memory tokens. Leave allow_special_tokens off")
            if room is not None and len(ids) + max_new_tokens > room:
                raise QuestionError(
                    index,
                    f"prompt and blocks ({len(ids)} tokens) and answer ({max_new_tokens}) must fit into the model's "
                    f"{room} positions (max_position_embeddings). Leave the question out, or lower max_new_tokens.",
                )
        return prompts

    @staticmethod
    def _num_rows(model: Any) -> int:
        return int(model.get_input_embeddings().weight.shape[0])
