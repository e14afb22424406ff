"""Compare an export's answers in a fresh, plain process with the plugin's greedy tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.data.chats import Chat, begun_of
from rim_peft.data.examples import Question, Templates
from rim_peft.data.tokenization import Encoder, padding_id
from rim_peft.export.folder import ExportOptions
from rim_peft.export.tokens import MemoryTokens
from rim_peft.inference import BlockAnswerer
from rim_peft.inference.greedy import cut_behind_eos

LEAST_PROMPTS = 32
_SHOWN_ERROR_CHARACTERS = 2000


class ExportCheckError(ValueError):
    """An export that answers differently from its adapter; its files stay where they are."""


@dataclass(frozen=True)
class Expected:
    """The plugin's answer to a prompt, which an export must give too.

    Attributes:
        prompt: as a user of the export writes it.
        ids: prompt ids without blocks, as in training.
        answer: the plugin's greedy tokens, including EOS if it was reached.
        spells_tokens: whether the question spells special tokens, which plain transformers would read as special.
    """

    prompt: Question
    ids: list[int]
    answer: list[int]
    spells_tokens: bool = False

    def as_asked(
        self, memory: MemoryTokens, places: dict[str, bool]
    ) -> tuple[Question | list[int] | dict[str, Any], str]:
        """Return what the fresh process tokenises, and what it appends; ids if it would read the text differently."""
        if self.spells_tokens or any(name in str(self.prompt) for name in memory.names):
            return [*self.ids, *memory.block_ids], ""
        if isinstance(self.prompt, Chat):
            options = {"tools": self.prompt.tools or None, **self.prompt.chat_template_kwargs}
            return {"messages": list(self.prompt), "options": options}, "" if places["chat"] else memory.block_text
        return self.prompt, "" if places[_kind(self)] else memory.block_text


@dataclass(frozen=True)
class CheckResult:
    """How many prompts an export answered with the plugin's tokens.

    A near tie is an answer that first differs where the export's scores of the two tokens nearly tie: within two
    roundings of its weights' type, relative to the largest score. In float32 there are practically none.

    Attributes:
        num_prompts: prompts asked.
        num_equal: prompts answered with the same tokens under the export's own generation settings.
        num_near_ties: prompts that first differ at a near tie.
        num_equal_unguarded, num_near_ties_unguarded: the same with memory tokens not suppressed, as in engines that
            ignore this setting.
        differing: a line for each prompt with another answer, near ties included.
        margin: smallest distance between the highest score and a memory token's, relative to the largest score, with
            nothing suppressed; None without memory tokens.
    """

    num_prompts: int
    num_equal: int
    num_near_ties: int
    num_equal_unguarded: int
    num_near_ties_unguarded: int
    differing: list[str] = field(default_factory=list)
    margin: float | None = None

    def num_wrong(self, *, head_is_tied: bool) -> int:
        """Count prompts with other tokens, without near ties; a tied head relies on the generation settings."""
        right = self.num_equal + self.num_near_ties
        if not head_is_tied:
            right = min(right, self.num_equal_unguarded + self.num_near_ties_unguarded)
        return self.num_prompts - right

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def expect(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    templates: Templates,
    num_blocks: int,
    max_new_tokens: int,
) -> list[Expected]:
    """Answer questions with the plugin's ``generate``, one at a time.

    Raises:
        ValueError: there are fewer than ``LEAST_PROMPTS``.
    """
    if len(questions) < LEAST_PROMPTS:
        raise ValueError(
            f"prompts: must be at least {LEAST_PROMPTS} to check an export, got {len(questions)}. Give a file with "
            "more questions (--prompts)."
        )
    answerer = BlockAnswerer(
        model, tokenizer, templates=templates, num_blocks=num_blocks, max_new_tokens=max_new_tokens
    )
    encoder = Encoder(tokenizer, templates)
    expected = []
    for question, ids in zip(questions, answerer.tokenize(questions), strict=True):
        if begun_of(question):
            raise ValueError(
                "prompts: must not begin an answer (continue_final_message). Give the user's message last."
            )
        (answer,) = answerer.generate([ids])
        if isinstance(question, str):
            prompt: Question = templates.prompt.format(question=question)
        else:  # the export's template gets an earlier answer as the model says it
            said = encoder.as_said(question)
            prompt = question.with_messages(said) if isinstance(question, Chat) else said
        expected.append(Expected(prompt, ids, answer, encoder.spells_tokens(question)))
    return expected


@dataclass(frozen=True)
class Exported:
    """An export as a fresh process finds it.

    Attributes:
        model: folder or Hub id of the plain model.
        tokenizer_folder: folder of its tokenizer.
        places: what this tokenizer appends blocks to; elsewhere they are written after the prompt.
        dtype: type of the export's weights, which defines a near tie.
        adapter: folder of a plain LoRA adapter for the model.
        settings: generation settings instead of the model's own.
        revision: commit of a model on the Hub.
    """

    model: Path | str
    tokenizer_folder: Path
    places: dict[str, bool]
    dtype: torch.dtype
    adapter: Path | None = None
    settings: dict[str, Any] | None = None
    revision: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return what the process needs to load it, ready for JSON."""
        return {
            "model": str(Path(self.model).resolve() if Path(self.model).exists() else self.model),
            "revision": self.revision or "main",
            "tokenizer": str(self.tokenizer_folder.resolve()),
            "adapter": None if self.adapter is None else str(self.adapter.resolve()),
            "settings": self.settings,
        }


def check(
    expected: Sequence[Expected],
    tokenizer: PreTrainedTokenizerBase,
    memory: MemoryTokens,
    exported: Exported,
    *,
    max_new_tokens: int,
) -> CheckResult:
    """Ask an export in a fresh process, which does not know this package, and compare.

    Raises:
        ExportCheckError: the process fails, or reads a prompt differently from training.
    """
    job = {
        **exported.describe(),
        "eos_id": tokenizer.eos_token_id,
        "pad_id": padding_id(tokenizer, min(memory.ids, default=None)),
        "max_new_tokens": max_new_tokens,
        "memory_ids": memory.ids,
        "prompts": [(*item.as_asked(memory, exported.places), item.answer) for item in expected],
    }
    answers = _ask(job, folder=exported.tokenizer_folder)
    _check_ids(expected, answers, memory)
    return _compare(expected, answers, tokenizer, memory, tolerance=2 * torch.finfo(exported.dtype).eps)


def _check_ids(expected: Sequence[Expected], answers: list[dict[str, Any]], memory: MemoryTokens) -> None:
    for item, found in zip(expected, answers, strict=True):
        if found["ids"] != [*item.ids, *memory.block_ids]:
            raise ExportCheckError(
                f"tokenizer: the export must read a prompt as training did, followed by its blocks once; "
                f"{_short(item)} became {found['ids']}, not {[*item.ids, *memory.block_ids]}. Try "
                "--append-to none, and write the blocks after prompts."
            )


def _compare(
    expected: Sequence[Expected],
    answers: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    memory: MemoryTokens,
    *,
    tolerance: float,
) -> CheckResult:
    """Count the answers equal to the plugin's, with the export's generation settings and with nothing suppressed."""
    counts: dict[str, int] = {}
    differing: dict[str, str] = {}
    for mode in ("guarded", "unguarded"):
        parted = [
            (item, found[mode])
            for item, found in zip(expected, answers, strict=True)
            if cut_behind_eos(found[mode]["tokens"], tokenizer.eos_token_id) != item.answer
        ]
        counts[f"equal_{mode}"] = len(expected) - len(parted)
        counts[f"near_{mode}"] = sum(found["gap"] is not None and found["gap"] <= tolerance for _, found in parted)
        for item, found in parted:
            differing.setdefault(_short(item), _describe(item, found, tolerance, tokenizer))
    return CheckResult(
        num_prompts=len(expected),
        num_equal=counts["equal_guarded"],
        num_near_ties=counts["near_guarded"],
        num_equal_unguarded=counts["equal_unguarded"],
        num_near_ties_unguarded=counts["near_unguarded"],
        differing=list(differing.values()),
        margin=min((found["unguarded"]["margin"] for found in answers if memory.ids), default=None),
    )


def _ask(job: dict[str, Any], *, folder: Path) -> list[dict[str, Any]]:
    source = Path(__file__).with_name("fresh.py").read_text(encoding="utf-8")
    done = subprocess.run(  # noqa: S603 - this package's own file, by this Python
        [sys.executable, "-c", source],
        input=json.dumps(job),
        capture_output=True,
        check=False,
        cwd=folder,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        raise ExportCheckError(
            f"{folder}: plain transformers cannot run the export:\n{done.stderr[-_SHOWN_ERROR_CHARACTERS:]}"
        )
    result = json.loads(done.stdout)
    if "rim_peft" in result["modules"]:
        raise ExportCheckError("the fresh process imported rim_peft, so the check proves nothing.")
    answers: list[dict[str, Any]] = result["answers"]
    return answers


def _describe(item: Expected, found: dict[str, Any], tolerance: float, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say where two answers first differ, and whether that is a near tie."""
    tokens, gap = found["tokens"], found["gap"]
    pairs = zip(item.answer, tokens, strict=False)
    place = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(item.answer), len(tokens)))
    wanted, got = (_token(ids, place, tokenizer) for ids in (item.answer, tokens))
    line = f"{_short(item)}: token {place} is {got}, not {wanted}"
    if gap is None:
        return line
    return f"{line}; both score alike within {gap:.1e}{' (a near tie)' if gap <= tolerance else ''}"


def _token(ids: list[int], place: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.decode(ids[place : place + 1])) if place < len(ids) else "none"


def _kind(item: Expected) -> str:
    return "prompt" if isinstance(item.prompt, str) else "chat"


def _short(item: Expected) -> str:
    text = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
    return repr(text if len(text) <= 60 else text[:57] + "...")


def raise_if_differing(result: CheckResult, options: ExportOptions, folder: Path, *, head_is_tied: bool) -> None:
    """Raise if an export answers too many prompts with other tokens than the plugin.

    Raises:
        ExportCheckError: it does.
    """
    num_wrong = result.num_wrong(head_is_tied=head_is_tied)
    if num_wrong <= options.max_differing:
        return
    shown = "\n".join(f"  {line}" for line in result.differing[:5])
    raise ExportCheckError(
        f"{folder}: must give the adapter's greedy tokens, and differs on {num_wrong} of {result.num_prompts} prompts, "
        f"near ties aside:\n{shown}\nThe files are kept. If rounding is the cause, use --dtype float32; to accept it, "
        "use --max-differing."
    )
