"""What the trainers of both stages read: rows tokenised and checked, batches by rows or by tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rim_peft.data.batching import LengthCurriculum, load_by_tokens
from rim_peft.data.preparation import COLUMNS, prepare_dataset
from rim_peft.data.table import check_table
from rim_peft.sequence import BlockTokens
from rim_peft.training.processes import main_first
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.watching import WatchedTrainer
from rim_peft.tuner.config import RiMConfig

T = TypeVar("T", bound="ReadoutData")


class ReadoutData(WatchedTrainer, ABC):
    """The data side of :class:`~rim_peft.training.readout_trainer.ReadoutTrainer`.

    Batches stay on the host: their rows are arranged there, where lengths are known without asking a GPU.
    """

    args: ReadoutConfig
    data_collator: Any
    needs_steps: bool
    _signature_columns: Any
    _rim_config: RiMConfig
    _max_positions: int | None

    @classmethod
    def without_model(
        cls: type[T], args: ReadoutConfig, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> T:
        """Return a trainer that cannot train: it knows what a stage makes of rows, and needs no model for that.

        Args:
            args: the stage's options.
            config: of the adapter, attached to a base before, so that it knows the memory's ids.
            tokenizer: of the base; a stage that writes steps out needs it.
        """
        trainer = cls.__new__(cls)
        trainer.args, trainer._rim_config, trainer._tokenizer = args, config, tokenizer
        return trainer

    @abstractmethod
    def readouts(self) -> Callable[..., list[list[int]]]:
        """Return the function from a tokenised row to what is read out after each of its blocks.

        With ``num_blocks`` it gives the readouts of so many.

        It must not hold the trainer, since data loader processes get it by pickle.
        """

    @property
    def blocks(self) -> BlockTokens:
        """What stands before each readout."""
        return self._rim_config.block_tokens

    @property
    def min_blocks(self) -> int:
        """Blocks that every row has at the least; at the most where each batch draws its own number."""
        return self._rim_config.num_blocks if self.args.block_range is None else self.args.block_range[1]

    def row_limits(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the arguments of ``prepare_dataset`` that say what a row must have and how long it is."""
        return {
            "needs_steps": self.needs_steps,
            "num_blocks": self.min_blocks,
            "block_length": self.blocks.length,
            "vocab_size": self.blocks.begin,  # the first id that is memory's
        }

    def check_rows(self, rows: Dataset) -> None:
        """Check that each phase of a curriculum by length has rows.

        Raises:
            ValueError: one has none.
        """
        if self.args.length_shares is not None:
            self._curriculum(rows, num_samples=1)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.length_shares is None:
            return super()._get_train_sampler(train_dataset)
        args: Any = self.args
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        in_step = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        whole = args.max_steps * in_step if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(rows))
        return self._curriculum(rows, num_samples=whole)

    def _curriculum(self, rows: Dataset, *, num_samples: int) -> LengthCurriculum:
        args = self.args
        return LengthCurriculum(
            [len(steps) for steps in rows["step_ids"]],
            shares=args.length_shares or [1.0],
            num_samples=num_samples,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: ReadoutConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Tokenise a dataset, unless that has been done.

        Raises:
            ValueError: rows tokenised before hold ids that are memory's, or lack the steps that this stage needs.
        """
        if set(COLUMNS) <= set(dataset.column_names or ()):
            if self.needs_steps and isinstance(dataset, Dataset) and not all(dataset["step_ids"]):
                raise ValueError(
                    f"{dataset_name} dataset: rows that are tokenised already must have steps for this training, some "
                    "have none. Give rows with question, steps and answer."
                )
            if isinstance(dataset, Dataset):
                check_table(dataset, processing_class, self.blocks.begin)
            return dataset
        limits = self.row_limits(processing_class)
        return main_first(  # the others find its table on the disk
            lambda: prepare_dataset(
                dataset,
                processing_class,
                templates=args.templates,
                **limits,
                max_length=args.max_length,
                max_positions=self._max_positions,
                on_bad_rows=args.on_bad_rows,
                num_proc=args.dataset_num_proc,
            )
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, each of so many rows or, with ``max_tokens_per_batch``, of tokens.

        Raises:
            ValueError: the rows are a stream, and their lengths are needed.
        """
        if self.args.length_shares is not None and not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                "length_shares: needs the rows' lengths, which a stream does not have. Give a Dataset, or leave "
                "length_shares out."
            )
        if self.args.max_tokens_per_batch is None:
            return super().get_train_dataloader()
        order: Any = self._get_train_sampler()
        loader = load_by_tokens(
            self.train_dataset,
            order,
            self.data_collator,
            max_tokens=self.args.max_tokens_per_batch,
            num_processes=self.accelerator.num_processes,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # Each process gets as many batches; accelerate, which would see to it, needs batches of one size for that.
        before, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return _on_host(self.accelerator.prepare(loader))
        finally:
            self.accelerator.even_batches = before

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _on_host(super()._get_dataloader(*args, **kwargs))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave a batch where it is: rows are arranged on the host, where their lengths are known, and then sent."""
        return inputs


def _on_host(loader: DataLoader) -> DataLoader:
    """Keep accelerate from sending batches to the device."""
    vars(loader)["device"] = None
    return loader
