"""Check a run before it begins: without weights, without a GPU, reporting every error at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rim_peft.recipe import Recipe
from rim_peft.recipe.sections import HARDWARE
from rim_peft.run.at_hand import AtHand, MetaBase
from rim_peft.run.costs import (
    count_parameters,
    find_changed,
    find_unread,
    prepare,
)
from rim_peft.run.findings import RunFindings, StageFindings
from rim_peft.run.output_folder import lacking_space
from rim_peft.run.rehearsal import rehearse
from rim_peft.run.rows import RunRows, check_validation
from rim_peft.run.stage_check import StageCheck, name_of
from rim_peft.tasks.task import GeneratedTask
from rim_peft.training.curriculum import check_stages
from rim_peft.training.head import Head

_LOOKED_AT = 10_000
"""How many rows' texts are checked for changes by the tokenizer."""


@dataclass(frozen=True)
class Preflight:
    """Checks runs before they begin.

    Attributes:
        at_hand: finds what the runs need.
        row_tokens: tokens of the rows for which memory is estimated; None for the longest rows.
        device: ``"cuda"`` or ``"cpu"``; None for a GPU if there is one or the recipe needs one, otherwise the CPU.
    """

    at_hand: AtHand = field(default_factory=AtHand)
    row_tokens: int | None = None
    device: str | None = None

    def check(self, recipe: Recipe) -> RunFindings:
        """Check a parsed recipe."""
        is_of_another = self.device == "cuda" and not torch.cuda.is_available()
        found = RunFindings(self.at_hand.source(recipe), self.device or _device(recipe), is_of_another)
        looks = found.attempt("stages", lambda: self._stages(found, recipe)) or []
        found.stages = [look.stage for look in looks]
        base = self._look_at_base(found, recipe, looks)
        tokenizer: PreTrainedTokenizerBase | None = None
        if base is not None and found.base is not None:
            tokenizer = found.attempt("tokens", lambda: self.at_hand.tokenizer(recipe))
        rows: RunRows | None = None
        # Do not generate rows that nothing could use.
        if found.base is None or tokenizer is not None or not isinstance(recipe.task(), GeneratedTask):
            rows = found.attempt("rows", lambda: self.at_hand.rows(recipe), section="data")
        if base is not None and found.base is None and rows is not None:
            tokenizer = found.attempt("tokens", lambda: self.at_hand.tokenizer(recipe))  # trained on the rows
        if rows is not None and rows.validation is not None:
            found.attempt("validation", partial(check_validation, rows.validation))
        for look in looks:
            look.at_rows(rows, base, tokenizer)
            step = partial(rehearse, recipe, look.stage.stage, tokenizer, num_steps=look.stage.num_steps)
            found.attempt(f"{look.stage.stage}: first step", step, section=look.stage.stage)
        self._look_at_machine(found, recipe)
        found.attempt("disk", partial(self._look_at_disk, found, recipe, looks))
        if rows is not None and tokenizer is not None:
            found.attempt("texts", partial(_note_changed, found, recipe, rows, tokenizer))
            found.attempt("texts", partial(_note_unread, found, rows, tokenizer))
        found.errors = list(dict.fromkeys(found.errors))
        return found

    def _stages(self, found: RunFindings, recipe: Recipe) -> list[StageCheck]:
        looks = []
        for name, (trainer_class, args) in zip(recipe.stages, recipe.stage_trainers(anywhere=True), strict=True):
            stage = StageFindings(name, optimizer=name_of(args.optim))
            looks.append(StageCheck(self.row_tokens, found, recipe, stage, trainer_class, args))
            if not found.errors:
                before = [(one.trainer_class, one.args) for one in looks]
                found.attempt("stages", partial(check_stages, before), section=name)
        return looks

    def _look_at_machine(self, found: RunFindings, recipe: Recipe) -> None:
        """Record the hardware that the stages need and this machine lacks."""
        for stage in recipe.stages:
            if getattr(recipe, stage).get("push_to_hub"):
                found.not_checked.append(f"{stage}.push_to_hub: access to the Hub is checked when the training begins.")
            try:
                recipe.stage_trainer(stage)
            except ValueError as error:
                asked = [name for name in HARDWARE if getattr(recipe, stage).get(name)]
                message = f"{stage}.{' or '.join(asked)}: {error}"
                if self.device == "cpu" or torch.cuda.is_available():
                    found.errors.append(message)
                elif self.device is None:
                    found.notes.append(f"{message} This machine cannot train it; checked for one with a GPU.")

    def _look_at_disk(self, found: RunFindings, recipe: Recipe, looks: Sequence[StageCheck]) -> None:
        folder = Path(recipe.output_dir)
        if note := lacking_space(folder, [(look.args, look.stage.memory, look.stage.num_steps) for look in looks]):
            found.notes.append(note)

    def _look_at_base(self, found: RunFindings, recipe: Recipe, looks: Sequence[StageCheck]) -> MetaBase | None:
        """Check whether the base supports the adapter and the stages; None if its configuration is not here."""
        config = found.attempt("base, parameters, memory and tokens", lambda: self.at_hand.config(recipe))
        if config is None:
            return None
        base = MetaBase(config, recipe, has_bf16=found.device == "cuda")
        num_errors = len(found.errors)
        found.attempt("base", base.check_implementation, section="model")
        found.attempt("weights", lambda: self.at_hand.check_weights(recipe))
        found.architecture, found.attention = found.attempt("base", base.check, section="model") or (None, None)
        if found.architecture is not None and found.attempt("output head", base.choose_head) is Head.OWN:
            found.notes.append(
                f"TRL's fused head does not give the logits of {found.architecture}: training uses its own head, "
                "which takes more memory."
            )
        model = found.attempt("adapter, parameters and memory", base.attach, section="adapter")
        is_own = model is not None
        if model is None:  # the stages can still be checked, with another adapter that has the same blocks
            model = RunFindings(found.base, found.device).attempt("", base.attach_blocks)
        if model is None:
            return base
        for look in looks:
            found.attempt(look.stage.stage, partial(look.at_model, model), section=look.stage.stage)
        if not is_own:
            return base
        if looks:
            prepare(model, looks[0].objective(base), looks[0].args)
        found.num_trainable, found.num_frozen = count_parameters(model)
        base.can_be_trained = len(found.errors) == num_errors
        return base


def _note_changed(found: RunFindings, recipe: Recipe, rows: RunRows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Note rows whose texts the tokenizer changes: the model learns and writes the changed texts."""
    for which, part in (("training", rows.train), ("validation", rows.validation)):
        if isinstance(part, Dataset):
            part = part.select(range(min(len(part), _LOOKED_AT)))
            count, changed = find_changed(part, tokenizer, recipe.data.templates)
            if changed is not None:
                text, written = (shown[:40] for shown in changed)
                found.notes.append(
                    f"{count} of {len(part)} {which} rows have texts that the tokenizer changes, such as {text!r} to "
                    f"{written!r}. Answers are judged in the changed form."
                )


def _note_unread(found: RunFindings, rows: RunRows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Note rows with variables that the chat template does not read: made for another, they have no effect."""
    for which, part in (("training", rows.train), ("validation", rows.validation)):
        if isinstance(part, Dataset):
            part = part.select(range(min(len(part), _LOOKED_AT)))
            count, names = find_unread(part, tokenizer)
            if count:
                found.notes.append(
                    f"{count} of {len(part)} {which} rows have chat_template_kwargs that the chat template does not "
                    f"read ({', '.join(names)}), so these have no effect."
                )


def _device(recipe: Recipe) -> str:
    """Return the device that a recipe is checked for: a GPU if this machine has one or the recipe needs one."""
    stages = [getattr(recipe, stage) for stage in recipe.stages]
    asks = any(stage.get(name) for stage in stages for name in HARDWARE)
    asks = asks or any(str(stage.get("optim", "")).startswith("paged_") for stage in stages)
    asks = asks or recipe.model.attn_implementation == "flex_attention"
    return "cuda" if asks or torch.cuda.is_available() else "cpu"
