"""Check one stage of a run: its adapter, its rows, and the memory of its largest batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rim_peft.data.batching import Pace, order_by_length
from rim_peft.data.examples import BadRowsError, list_rows
from rim_peft.data.objective import Objective, TokenizedRow
from rim_peft.methods import get_method
from rim_peft.recipe import Recipe
from rim_peft.recipe.sections import HARDWARE
from rim_peft.run.at_hand import MetaBase, NotAtHandError
from rim_peft.run.base import stored_quantization
from rim_peft.run.costs import (
    StageRows,
    count_batches,
    count_steps,
    estimate,
    find_largest_batch,
    find_unreadable,
    lay_out,
    precision,
    stated_row,
)
from rim_peft.run.findings import RunFindings, StageFindings
from rim_peft.run.rows import RunRows, show_rows
from rim_peft.tasks.stories import DrawnTask
from rim_peft.training.attachment import check_adapter
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.bases import num_positions
from rim_peft.tuner.layers import check_uncompiled


@dataclass
class StageCheck:
    """Checks one stage of a run, and records the findings.

    Attributes:
        row_tokens: as in :class:`~rim_peft.run.preflight.Preflight`.
        found: findings about the run.
        recipe: its recipe.
        stage: findings about the stage.
        trainer_class: the stage's trainer.
        args: its options.
    """

    row_tokens: int | None
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
        stage.precision = None if autocast is None else name_of(autocast)
        objective = self.objective(base, tokenizer)
        if batch is None or self.row_tokens is not None:
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
        length = self.row_tokens or most
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


def _number_of_rows(recipe: Recipe) -> int | None:
    """Return the number of training rows if it follows from the options of a task that draws its rows."""
    task, data = recipe.task(), recipe.data
    if not isinstance(task, DrawnTask) or (data.validation_rows and data.validation_split is None):
        return None
    return min(task.num_in(data.train_split), data.train_rows or task.num_in(data.train_split))


def name_of(value: Any) -> str:
    """Return the name of an enum member or a torch dtype."""
    return str(getattr(value, "value", value)).removeprefix("torch.")
