"""Check a run before it begins: without weights, without a GPU, reporting every error at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rim_peft.data.batching import Pace, order_by_length
from rim_peft.data.examples import BadRowsError, list_rows
from rim_peft.data.objective import Objective, TokenizedRow
from rim_peft.methods import get_method
from rim_peft.recipe import Recipe
from rim_peft.recipe.checks import option_names
from rim_peft.recipe.sections import HARDWARE
from rim_peft.run.at_hand import AtHand, MetaBase, NotAtHandError
from rim_peft.run.base import stored_quantization
from rim_peft.run.costs import (
    BatchSize,
    PeakMemory,
    StageRows,
    count_batches,
    count_parameters,
    count_steps,
    estimate,
    find_changed,
    find_largest_batch,
    find_unread,
    find_unreadable,
    lay_out,
    precision,
    prepare,
    stated_row,
)
from rim_peft.run.output_folder import lacking_space
from rim_peft.run.rehearsal import rehearse
from rim_peft.run.rows import RunRows, ShownRow, check_validation, show_rows
from rim_peft.tasks.stories import DrawnTask
from rim_peft.tasks.task import GeneratedTask
from rim_peft.training.attachment import check_adapter
from rim_peft.training.curriculum import check_stages
from rim_peft.training.head import Head
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.bases import check_uncompiled, num_positions

T = TypeVar("T")


@dataclass
class StageFindings:
    """Findings about a stage; None for anything unknown.

    Attributes:
        stage: its section.
        num_rows: rows that it trains on.
        num_bad_rows: rows that it cannot train on.
        mean_tokens: mean tokens of a row as laid out, readouts included.
        longest_tokens: tokens of the longest row.
        tokens_per_epoch: tokens of all rows.
        num_steps: optimiser steps on one device.
        batch: the largest batch.
        stated_tokens: tokens per row of that batch, if its rows are artificial.
        precision: type of mixed precision, such as ``"bfloat16"``; None for none.
        optimizer: its name.
        memory: peak memory of a step on that batch.
    """

    stage: str
    num_rows: int | None = None
    num_bad_rows: int | None = None
    mean_tokens: float | None = None
    longest_tokens: int | None = None
    tokens_per_epoch: int | None = None
    num_steps: int | None = None
    batch: BatchSize | None = None
    stated_tokens: int | None = None
    precision: str | None = None
    optimizer: str = ""
    memory: PeakMemory | None = None


@dataclass
class RunFindings:
    """Findings about a run.

    Attributes:
        base: folder or Hub id of the base; None if it is built from scratch.
        device: ``"cuda"`` or ``"cpu"``, for which memory is estimated.
        is_of_another: whether another machine will train it, so that missing packages here are not errors.
        architecture: the base's class.
        attention: its attention implementation.
        num_trainable: trained numbers.
        num_frozen: the base's numbers, each counted once even in quantised weights.
        stages: findings about each stage.
        first_rows: the first rows as the first stage trains them.
        errors: problems that would stop the run.
        not_checked: what could not be checked, why, and what to do.
        notes: problems that do not stop it.
    """

    base: str | None
    device: str
    is_of_another: bool = False
    architecture: str | None = None
    attention: str | None = None
    num_trainable: int | None = None
    num_frozen: int | None = None
    stages: list[StageFindings] = field(default_factory=list)
    first_rows: list[ShownRow] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, look: Callable[[], T], *, section: str = "") -> T | None:
        """Return the result of a check, or None after recording its failure as an error or as not checked.

        Args:
            what: name of the check, for messages.
            look: the check; may raise anything.
            section: section of the recipe whose keys the errors are about.
        """
        try:
            return look()
        except NotAtHandError as error:
            self.not_checked.append(f"{what}: {error}")
        except ImportError as error:
            if self.is_of_another:
                self.not_checked.append(f"{what}: a package is missing here: {error}")
            else:
                self.errors.append(_with_section(section, str(error)))
        except (ValueError, OSError) as error:
            self.errors.append(_with_section(section, str(error)))
        except Exception as error:  # a base's own code can raise anything
            self.errors.append(f"{what}: {type(error).__name__}: {error}")
        return None

    @property
    def peak(self) -> int | None:
        """Peak bytes of the stage that takes the most; None if no stage's peak is known."""
        return max((stage.memory.total for stage in self.stages if stage.memory is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-compatible values; memory in bytes, with ``total``."""
        values = {name: value for name, value in asdict(self).items() if name != "is_of_another"}
        for stage, entry in zip(self.stages, values["stages"], strict=True):
            if stage.memory is not None:
                entry["memory"]["total"] = stage.memory.total
        return {**values, "peak": self.peak}


def _with_section(section: str, message: str) -> str:
    """Return an error; if it begins with a key of the section, with the key's full name."""
    is_key = section != "" and message.partition(":")[0] in option_names(section)
    return f"{section}.{message}" if is_key else message


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

    def _look_at_disk(self, found: RunFindings, recipe: Recipe, looks: Sequence[_StageLook]) -> None:
        folder = Path(recipe.output_dir)
        if note := lacking_space(folder, [(look.args, look.stage.memory, look.stage.num_steps) for look in looks]):
            found.notes.append(note)

    def _look_at_base(self, found: RunFindings, recipe: Recipe, looks: Sequence[_StageLook]) -> MetaBase | None:
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


@dataclass
class _StageLook:
    """Checks one stage of a run, and records the findings."""

    preflight: Preflight
    found: RunFindings
    recipe: Recipe
    stage: StageFindings
    trainer_class: type[ReadoutTrainer]
    args: Any

    def objective(self, base: MetaBase, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return the stage's objective."""
        if base.adapter is None:
            raise NotAtHandError("the adapter could not be attached to the base.")
        return self.trainer_class.objective_of(self.args, base.adapter, tokenizer)

    def at_model(self, model: Any) -> None:
        """Check that the stage can train the base and the adapter.

        Raises:
            ValueError: it cannot.
        """
        config = model.peft_config[model.active_adapter]
        check_adapter(model, config, min_blocks=self.trainer_class.least_blocks, block_range=self.args.block_range)
        if self.args.compile_layers:
            check_uncompiled("compile_layers", config)
        self.trainer_class.check_model(model)

    def at_rows(self, rows: RunRows | None, base: MetaBase | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Record the stage's tokens, steps and memory, as far as rows, base and tokenizer are available."""
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
        """Record the lengths of rows; return the largest batch."""
        stage, objective = self.stage, self.objective(base, tokenizer)
        limit = num_positions(base.config)
        laid_out = self._lay_out(rows.train, "training", objective, tokenizer, limit)
        if rows.validation is not None:
            self._lay_out(rows.validation, "validation", objective, tokenizer, limit)
        if laid_out is None:
            return None
        if stage is self.found.stages[0]:
            self.found.first_rows = show_rows(laid_out.rows, objective, tokenizer)
        if self.args.length_shares is not None:  # checks that each phase has rows
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
        """Return rows as the stage lays them out, and record bad ones; None if all are bad."""
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
        """Record what is known about rows without tokenising them."""
        config = self.recipe.rim_config()
        config.first_memory_id = 1  # a placeholder, since the base is missing: ids do not matter here
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
                f"{text}. Correct the data, or omit these rows with data.on_bad_rows=drop.\n{listed}"
            )
        else:
            self.found.notes.append(f"{text} are dropped.\n{listed}")

    def _count_steps(self, lengths: Sequence[int]) -> None:
        if lengths:
            self.stage.num_steps = count_steps(self.args, count_batches(self.args, lengths))

    def _estimate(
        self, base: MetaBase, tokenizer: PreTrainedTokenizerBase | None, batch: list[TokenizedRow] | None
    ) -> None:
        """Record the peak memory of a step."""
        stage = self.stage
        if not get_method(self.recipe.method).branches:
            raise NotAtHandError("Coconut's sequential passes are not simulated. Run a step.")
        method = stored_quantization(base.config).get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise NotAtHandError(f"the base's files are quantised by {method}, which is not simulated. Run a step.")
        values = {name: value for name, value in getattr(self.recipe, stage.stage).items() if name in HARDWARE}
        autocast = precision(values, device=self.found.device)
        stage.precision = None if autocast is None else _name(autocast)
        objective = self.objective(base, tokenizer)
        if batch is None or self.preflight.row_tokens is not None:
            batch = self._stated_batch(base, objective, tokenizer)
        # Flex attention skips masked blocks, so it takes no more than sdpa.
        model = base.attach(attention="sdpa" if self.found.attention == "flex_attention" else None)
        stage.batch, stage.memory = estimate(
            model, objective, self.args, batch, autocast=autocast, device=self.found.device, head=base.head
        )
        if stage.memory.optimizer is None:
            self.found.not_checked.append(f"{stage.stage}: memory of the optimiser {stage.optimizer}: add it yourself.")

    def _stated_batch(
        self, base: MetaBase, objective: Objective, tokenizer: PreTrainedTokenizerBase | None
    ) -> list[TokenizedRow]:
        """Return a batch of artificial rows of ``row_tokens`` tokens, or as long as the recipe allows."""
        limits = [limit for limit in (self.args.max_length, num_positions(base.config)) if limit is not None]
        most = min(limits, default=None)
        length = self.preflight.row_tokens or most
        if length is None:
            raise NotAtHandError("neither the rows nor a limit of their length is known. Give --row-tokens.")
        if most is not None and length > most:
            raise NotAtHandError(f"rows of {length} tokens would be refused as longer than {most}. Give --row-tokens.")
        if getattr(self.args, "written_steps", False) and tokenizer is None:
            raise NotAtHandError("the separator between written steps is unknown without the base's tokenizer.")
        self.stage.stated_tokens = length
        size = self.args.per_device_train_batch_size
        if self.args.max_tokens_per_batch is not None:
            size = max(1, self.args.max_tokens_per_batch // length)
        return [stated_row(objective, length, num_blocks=self.recipe.rim_config().num_blocks)] * size


def _listed(bad: Sequence[tuple[int, str]]) -> str:
    return "\n".join(list_rows(bad))


def _device(recipe: Recipe) -> str:
    """Return the device that a recipe is checked for: a GPU if this machine has one or the recipe needs one."""
    stages = [getattr(recipe, stage) for stage in recipe.stages]
    asks = any(stage.get(name) for stage in stages for name in HARDWARE)
    asks = asks or any(str(stage.get("optim", "")).startswith("paged_") for stage in stages)
    asks = asks or recipe.model.attn_implementation == "flex_attention"
    return "cuda" if asks or torch.cuda.is_available() else "cpu"


def _number_of_rows(recipe: Recipe) -> int | None:
    """Return the number of training rows if it follows from the options of a task that draws its rows."""
    task, data = recipe.task(), recipe.data
    if not isinstance(task, DrawnTask) or (data.validation_rows and data.validation_split is None):
        return None
    return min(task.num_in(data.train_split), data.train_rows or task.num_in(data.train_split))


def _name(value: Any) -> str:
    """Return the name of an enum member or a torch dtype."""
    return str(getattr(value, "value", value)).removeprefix("torch.")
