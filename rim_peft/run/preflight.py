"""What can be said of a run before it begins: without weights, without a GPU, with every error at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rim_peft.data.batching import Pace, order_by_length
from rim_peft.data.collator import TokenizedRow
from rim_peft.data.examples import BadRowsError, list_rows
from rim_peft.data.objective import Objective
from rim_peft.data.tasks.stories import DrawnTask
from rim_peft.data.tasks.task import GeneratedTask
from rim_peft.methods import get_method
from rim_peft.recipe import Recipe
from rim_peft.recipe.sections import HARDWARE
from rim_peft.run.at_hand import AtHand, NotAtHandError
from rim_peft.run.base import stored_quantization
from rim_peft.run.findings import RunFindings, StageFindings
from rim_peft.run.lengths import (
    StageRows,
    count_batches,
    count_steps,
    find_changed,
    find_largest_batch,
    find_unreadable,
    lay_out,
    stated_row,
)
from rim_peft.run.memory import count_parameters, estimate, precision, prepare
from rim_peft.run.meta_base import MetaBase
from rim_peft.run.output_folder import lacking_space
from rim_peft.run.rehearsal import rehearse
from rim_peft.run.rows import RunRows, check_validation
from rim_peft.training.attachment import check_adapter
from rim_peft.training.curriculum import check_stages
from rim_peft.training.head import Head
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.compatibility import num_positions
from rim_peft.tuner.layers import check_uncompiled

_LOOKED_AT = 10_000
"""Rows of which texts are read back."""


@dataclass(frozen=True)
class Preflight:
    """Looks at runs.

    Attributes:
        at_hand: finds what they need.
        row_tokens: tokens of the rows for which memory is estimated; those of the longest rows if None.
        device: ``"cuda"`` or ``"cpu"``; None for a GPU where there is one or the recipe asks for what only GPUs have.
    """

    at_hand: AtHand = field(default_factory=AtHand)
    row_tokens: int | None = None
    device: str | None = None

    def check(self, recipe: Recipe) -> RunFindings:
        """Say what can be said of a recipe that was read without errors."""
        is_of_another = self.device == "cuda" and not torch.cuda.is_available()
        found = RunFindings(self.at_hand.source(recipe), self.device or _device(recipe), is_of_another)
        looks = found.attempt("stages", lambda: self._stages(found, recipe)) or []
        found.stages = [look.stage for look in looks]
        base = self._look_at_base(found, recipe, looks)
        tokenizer: PreTrainedTokenizerBase | None = None
        if base is not None and found.base is not None:
            tokenizer = found.attempt("tokens", lambda: self.at_hand.tokenizer(recipe))
        rows: RunRows | None = None
        # Rows that are made would be made for nothing.
        if found.base is None or tokenizer is not None or not isinstance(recipe.task(), GeneratedTask):
            rows = found.attempt("rows", lambda: self.at_hand.rows(recipe), section="data")
        if base is not None and found.base is None and rows is not None:
            tokenizer = found.attempt("tokens", lambda: self.at_hand.tokenizer(recipe))  # made from the rows
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
        found.errors = list(dict.fromkeys(found.errors))
        return found

    def _stages(self, found: RunFindings, recipe: Recipe) -> list[_StageLook]:
        looks = []
        for name, (trainer_class, args) in zip(recipe.stages, recipe.stage_trainers(anywhere=True), strict=True):
            stage = StageFindings(name, optimizer=_name(args.optim))
            looks.append(_StageLook(self, found, recipe, stage, trainer_class, args))
            if not found.errors:
                before = [(one.trainer_class, one.args) for one in looks]
                found.attempt("stages", partial(check_stages, before), section=name)
        return looks

    def _look_at_machine(self, found: RunFindings, recipe: Recipe) -> None:
        """Say what this machine lacks of what the stages ask for, which stops a run here alone."""
        for stage in recipe.stages:
            if getattr(recipe, stage).get("push_to_hub"):
                found.not_checked.append(f"{stage}.push_to_hub: the Hub is asked when the training begins.")
            try:
                recipe.stage_trainer(stage)
            except ValueError as error:
                asked = [name for name in HARDWARE if getattr(recipe, stage).get(name)]
                message = f"{stage}.{' or '.join(asked)}: {error}"
                if self.device == "cpu" or torch.cuda.is_available():
                    found.errors.append(message)
                elif self.device is None:
                    found.notes.append(f"{message} This machine cannot train it; looked at for one with a GPU.")

    def _look_at_disk(self, found: RunFindings, recipe: Recipe, looks: Sequence[_StageLook]) -> None:
        folder = Path(recipe.output_dir)
        if note := lacking_space(folder, [(look.args, look.stage.memory, look.stage.num_steps) for look in looks]):
            found.notes.append(note)

    def _look_at_base(self, found: RunFindings, recipe: Recipe, looks: Sequence[_StageLook]) -> MetaBase | None:
        """Check whether the base can have the adapter and train the stages; None if its configuration is not here."""
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
                f"TRL's fused head does not give the logits of {found.architecture}: its own head is trained through, "
                "which takes more memory."
            )
        model = found.attempt("adapter, parameters and memory", base.attach, section="adapter")
        is_own = model is not None
        if model is None:  # the stages' errors can be told by another adapter with the same blocks
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
    """Note rows whose texts the tokenizer changes: what is learned and answered is what it makes of them."""
    for which, part in (("training", rows.train), ("validation", rows.validation)):
        if isinstance(part, Dataset):
            part = part.select(range(min(len(part), _LOOKED_AT)))
            count, changed = find_changed(part, tokenizer, recipe.data.templates)
            if changed is not None:
                text, written = (shown[:40] for shown in changed)
                found.notes.append(
                    f"{count} of {len(part)} {which} rows have texts that the tokenizer changes, such as {text!r} to "
                    f"{written!r}. Answers are judged as it writes them."
                )


@dataclass
class _StageLook:
    """Looks at one stage of a run, and notes what it finds."""

    preflight: Preflight
    found: RunFindings
    recipe: Recipe
    stage: StageFindings
    trainer_class: type[ReadoutTrainer]
    args: Any

    def objective(self, base: MetaBase, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return what the stage trains of a row."""
        if base.adapter is None:
            raise NotAtHandError("the adapter could not be attached to the base.")
        return self.trainer_class.objective_of(self.args, base.adapter, tokenizer)

    def at_model(self, model: Any) -> None:
        """Refuse a base and an adapter that the stage cannot train.

        Raises:
            ValueError: it cannot.
        """
        config = model.peft_config[model.active_adapter]
        check_adapter(model, config, min_blocks=self.trainer_class.least_blocks, block_range=self.args.block_range)
        if self.args.compile_layers:
            check_uncompiled("compile_layers", config)
        self.trainer_class.check_model(model)

    def at_rows(self, rows: RunRows | None, base: MetaBase | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Note the stage's tokens, steps and memory, as far as rows, base and tokenizer are there."""
        stage, batch = self.stage, None
        stage.num_steps = count_steps(self.args, None)
        if base is not None and base.adapter is not None and rows is not None and tokenizer is not None:
            look = partial(self._count_tokens, rows, base, tokenizer)
            batch = self.found.attempt(f"{stage.stage}: tokens", look, section=stage.stage)
        elif rows is not None:
            self._count_rows(rows)
        elif self.args.max_tokens_per_batch is None:
            stage.num_rows = _number_of_rows(self.recipe)
            self._count_steps([0] * (stage.num_rows or 0))
        if base is not None and base.can_be_trained:
            self.found.attempt(f"{stage.stage}: memory", partial(self._estimate, base, tokenizer, batch))

    def _count_tokens(
        self, rows: RunRows, base: MetaBase, tokenizer: PreTrainedTokenizerBase
    ) -> list[TokenizedRow] | None:
        """Note the lengths of rows; return the largest batch."""
        stage, objective = self.stage, self.objective(base, tokenizer)
        limit = num_positions(base.config)
        laid_out = self._lay_out(rows.train, "training", objective, tokenizer, limit)
        if rows.validation is not None:
            self._lay_out(rows.validation, "validation", objective, tokenizer, limit)
        if laid_out is None:
            return None
        if self.args.length_shares is not None:  # whether each phase has rows
            pace = Pace.of(self.args, len(laid_out.rows), num_processes=1)
            order_by_length(laid_out.rows, self.args.length_shares, pace)
        stage.num_rows, stage.num_bad_rows = len(laid_out.lengths), len(laid_out.bad)
        stage.mean_tokens = round(sum(laid_out.lengths) / len(laid_out.lengths), 1)
        stage.longest_tokens = max(laid_out.lengths)
        stage.tokens_per_epoch = sum(laid_out.lengths)
        self._count_steps(laid_out.lengths)
        return [laid_out.rows[index] for index in find_largest_batch(self.args, laid_out.lengths)]

    def _lay_out(
        self,
        rows: Dataset,
        which: str,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        max_positions: int | None,
    ) -> StageRows | None:
        """Return rows as the stage lays them out, and note the bad ones; None if no other is there."""
        try:
            laid_out = lay_out(objective, self.args, rows, tokenizer, max_positions=max_positions)
        except BadRowsError as error:
            self.found.errors.append(
                f"{self.stage.stage}: all {len(rows)} {which} rows are bad.\n{_listed(error.rows)}"
            )
            return None
        self._say_bad(laid_out.bad, which)
        return laid_out

    def _count_rows(self, rows: RunRows) -> None:
        """Note what can be seen of rows that were not tokenised."""
        config = self.recipe.rim_config()
        config.first_memory_id = 1  # it stands for the base's, which is not at hand: ids do not matter here
        objective = self.trainer_class.objective_of(self.args, config)
        bad = find_unreadable(rows.train, needs_steps=objective.needs_steps)
        self.stage.num_bad_rows = len(bad)
        self.stage.num_rows = len(rows.train) - len(bad)
        self._say_bad(bad, "training")
        if self.args.max_tokens_per_batch is None:
            self._count_steps([0] * self.stage.num_rows)

    def _say_bad(self, bad: Sequence[tuple[int, str]], which: str) -> None:
        if not bad:
            return
        listed = _listed(bad)
        text = f"{self.stage.stage}: {len(bad)} bad {which} rows"
        if self.args.on_bad_rows == "error":
            self.found.errors.append(
                f"{text}. Correct the data, or leave such rows out with data.on_bad_rows=drop.\n{listed}"
            )
        else:
            self.found.notes.append(f"{text} are dropped.\n{listed}")

    def _count_steps(self, lengths: Sequence[int]) -> None:
        if lengths:
            self.stage.num_steps = count_steps(self.args, count_batches(self.args, lengths))

    def _estimate(
        self, base: MetaBase, tokenizer: PreTrainedTokenizerBase | None, batch: list[TokenizedRow] | None
    ) -> None:
        """Note the memory at the peak of a step."""
        stage = self.stage
        if not get_method(self.recipe.method).branches:
            raise NotAtHandError("Coconut's passes, one after the other, are not simulated. Try a step.")
        method = stored_quantization(base.config).get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise NotAtHandError(f"the base's files are quantised by {method}, which is not simulated. Try a step.")
        values = {name: value for name, value in getattr(self.recipe, stage.stage).items() if name in HARDWARE}
        autocast = precision(values, device=self.found.device)
        stage.precision = None if autocast is None else _name(autocast)
        objective = self.objective(base, tokenizer)
        if batch is None or self.preflight.row_tokens is not None:
            batch = self._stated_batch(base, objective, tokenizer)
        # Flex attention skips what is hidden, and takes no more than this.
        model = base.attach(attention="sdpa" if self.found.attention == "flex_attention" else None)
        stage.batch, stage.memory = estimate(
            model, objective, self.args, batch, autocast=autocast, device=self.found.device, head=base.head
        )
        if stage.memory.optimizer is None:
            self.found.not_checked.append(f"{stage.stage}: memory of the optimiser {stage.optimizer}: add it yourself.")

    def _stated_batch(
        self, base: MetaBase, objective: Objective, tokenizer: PreTrainedTokenizerBase | None
    ) -> list[TokenizedRow]:
        """Return a batch of rows of a stated length, or of the longest that the recipe allows."""
        limits = [limit for limit in (self.args.max_length, num_positions(base.config)) if limit is not None]
        most = min(limits, default=None)
        length = self.preflight.row_tokens or most
        if length is None:
            raise NotAtHandError("no row and no limit of their length is known. Give --row-tokens.")
        if most is not None and length > most:
            raise NotAtHandError(f"rows of {length} tokens would be refused as longer than {most}. Give --row-tokens.")
        if getattr(self.args, "written_steps", False) and tokenizer is None:
            raise NotAtHandError("what stands between written steps is not known without the base's tokenizer.")
        self.stage.stated_tokens = length
        size = self.args.per_device_train_batch_size
        if self.args.max_tokens_per_batch is not None:
            size = max(1, self.args.max_tokens_per_batch // length)
        return [stated_row(objective, length, num_blocks=self.recipe.rim_config().num_blocks)] * size


def _listed(bad: Sequence[tuple[int, str]]) -> str:
    return "\n".join(list_rows(bad))


def _device(recipe: Recipe) -> str:
    """Return the device that a recipe is looked at for: a GPU, where one is here or asked for."""
    stages = [getattr(recipe, stage) for stage in recipe.stages]
    asks = any(stage.get(name) for stage in stages for name in HARDWARE)
    asks = asks or any(str(stage.get("optim", "")).startswith("paged_") for stage in stages)
    asks = asks or recipe.model.attn_implementation == "flex_attention"
    return "cuda" if asks or torch.cuda.is_available() else "cpu"


def _number_of_rows(recipe: Recipe) -> int | None:
    """Return the number of training rows where it follows from the options of a task that draws its rows."""
    task, data = recipe.task(), recipe.data
    if not isinstance(task, DrawnTask) or (data.validation_rows and data.validation_split is None):
        return None
    return min(task.num_in(data.train_split), data.train_rows or task.num_in(data.train_split))


def _name(value: Any) -> str:
    """Return the name of an enum's member or a type of torch."""
    return str(getattr(value, "value", value)).removeprefix("torch.")
