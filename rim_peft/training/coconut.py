"""Coconut: continuous thoughts replace steps, stage by stage. Source: arXiv 2412.06769."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from rim_peft.data.objective import Objective, TokenizedRow, chain_parts, list_lengths, step_lengths
from rim_peft.sequence import IGNORE_INDEX
from rim_peft.sequence.layout import pad_left
from rim_peft.training.baseline import WrittenChain, separator_of
from rim_peft.training.head import run_head
from rim_peft.training.losses import phase_at
from rim_peft.training.metrics import TextMetrics
from rim_peft.training.readout_config import ReadoutConfig, check_unchanged
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.thoughts import check_thinks, think
from rim_peft.values import Range, are_shares, check_integer, check_ranges, check_share


def count_longest(row: TokenizedRow, *, separator_ids: Sequence[int], thoughts_per_step: int, num_stages: int) -> int:
    """Count a row's tokens at the stage where it is longest: prompt, ``<b>``, thoughts, ``</b>`` and text.

    >>> row = {"prompt_ids": [1], "step_ids": [[5, 6, 2], [7, 2]], "answer_ids": [8, 2]}
    >>> count_longest(row, separator_ids=[3], thoughts_per_step=1, num_stages=2)
    10
    """
    lengths = [len(part) for part in chain_parts(row, separator_ids=separator_ids)]
    texts = [sum(lengths[min(stage, len(lengths) - 1) :]) for stage in range(num_stages)] + [lengths[-1]]
    longest = max(thoughts_per_step * stage + text for stage, text in enumerate(texts))
    return len(row["prompt_ids"]) + 2 + longest


@dataclass(frozen=True)
class CoconutCollator:
    """Pad tokenised rows to a batch; :func:`cut_texts` then cuts a stage's texts from it.

    Attributes:
        parts: returns a row's written chain in parts: one for each step, then the answer.
        pad_id: id of padding.
    """

    parts: Callable[[TokenizedRow], list[list[int]]]
    pad_id: int

    def __call__(self, rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
        """Collate ``rows``.

        Returns:
            All int64: ``input_ids`` and ``attention_mask`` (B, P), prompts padded on the left; ``text_ids`` (B, L),
            whole chains, padded on the right with ``IGNORE_INDEX``; ``part_starts`` (B, T + 1), where each part begins
            in its chain, the answer's start repeated for chains of fewer than T steps.
        """
        parts = [self.parts(row) for row in rows]
        starts = [[0, *accumulate(len(part) for part in chain[:-1])] for chain in parts]
        most = max(map(len, starts))
        ids, mask = pad_left([row["prompt_ids"] for row in rows], self.pad_id)
        texts = [[token for part in chain for token in part] for chain in parts]
        length = max(map(len, texts))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "text_ids": torch.tensor([text + [IGNORE_INDEX] * (length - len(text)) for text in texts]),
            "part_starts": torch.tensor([places + places[-1:] * (most - len(places)) for places in starts]),
        }


def cut_texts(batch: Mapping[str, Tensor], num_steps: int | None) -> Tensor:
    """Return a batch's chains without their first steps.

    Args:
        num_steps: steps to omit; None for all, which leaves the answers.

    Returns:
        (B, Q) int64 labels, padded on the right with ``IGNORE_INDEX``.
    """
    texts, starts = batch["text_ids"], batch["part_starts"]
    last = starts.shape[1] - 1
    start = starts[:, last if num_steps is None else min(num_steps, last)]
    columns = torch.arange(texts.shape[1]) + start[:, None]
    cut = texts.gather(1, columns.clamp(max=texts.shape[1] - 1))
    cut = cut.masked_fill(columns >= texts.shape[1], IGNORE_INDEX)
    return cut[:, : int((cut != IGNORE_INDEX).sum(1).max())]


_REFUSED: dict[str, Any] = {
    "block_range": None,
    "length_accuracy": None,
    "pack_length": None,
    "max_tokens_per_batch": None,
    "pad_to_multiple_of": None,
    "compile_layers": False,
    "gradient_checkpointing": False,
}


@dataclass
class CoconutConfig(ReadoutConfig):
    """Options of :class:`CoconutTrainer`.

    Stage ``k`` has ``k · thoughts_per_step`` thoughts, then the chain without its first ``k`` steps; the last stage,
    ``num_stages``, has only the answer. ``step_template`` and ``answer_template`` format the chain's parts.
    """

    num_stages: int = field(
        default=3,
        metadata={
            "help": "Stages after stage 0, which is a plain chain of thought: stage k has thoughts for the first k "
            "steps, the last stage for all of them."
        },
    )
    thoughts_per_step: int = field(
        default=1, metadata={"help": "Continuous thoughts that replace a step; the paper uses 2 for GSM8K."}
    )
    stage_shares: list[float] | None = field(
        default=None,
        metadata={"help": "Each stage's share of the training, from stage 0; they sum to 1. Equal shares if not set."},
    )
    mix_share: float = field(
        default=0.0,
        metadata={"help": "Share of training steps, in [0, 1), that train a stage drawn at random from all stages."},
    )
    reset_optimizer: bool = field(
        default=True, metadata={"help": "Reset the optimiser's state at the start of each stage, as the paper does."}
    )
    step_separator: str = field(default="\n", metadata={"help": "Text after each step of a written chain."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Must stay off: a thought needs the KV cache of the earlier passes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unchanged(self, _REFUSED, "its thoughts run one after another on a KV cache", where=" for Coconut")
        for name in ("num_stages", "thoughts_per_step"):
            check_integer(name, getattr(self, name), least=1)
        check_ranges(self, dict.fromkeys(("num_stages", "thoughts_per_step"), Range(1, 1000)))
        check_share("mix_share", self.mix_share)
        shares = self.stage_shares
        if shares is not None and not (are_shares(shares) and len(shares) == self.num_stages + 1):
            raise ValueError(
                f"stage_shares: must be num_stages + 1 = {self.num_stages + 1} shares that sum to 1, the last one not "
                f"0, got {shares!r}. Give as many, or omit them for equal stages."
            )

    @property
    def num_thoughts(self) -> int:
        """Thoughts of the last stage, which a trained model uses to answer."""
        return self.num_stages * self.thoughts_per_step

    def stage_at(self, progress: float) -> int:
        """Return the stage after a share ``progress`` of the training, in [0, 1]."""
        return phase_at(progress, self.stage_shares or [1 / (self.num_stages + 1)] * (self.num_stages + 1))


@dataclass(frozen=True)
class Thoughts(WrittenChain):
    """A written chain whose first steps are replaced by thoughts; ``num_blocks`` is the number of stages.

    Attributes:
        thoughts_per_step: thoughts that replace a step.
    """

    thoughts_per_step: int = 1

    @property
    def trains_memory(self) -> bool:
        """Always: ``<b>`` and ``</b>`` enclose the thoughts."""
        return True

    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return the parts of the whole chain."""
        return chain_parts(row, separator_ids=self.separator_ids)

    def collator(self, **options: Any) -> CoconutCollator:
        """Return the collator of prompts and chains."""
        return CoconutCollator(self.readouts, pad_id=options["pad_id"])

    def num_tokens(self, row: TokenizedRow) -> int:
        """Count a row's tokens at the stage where it is longest."""
        return count_longest(
            row,
            separator_ids=self.separator_ids,
            thoughts_per_step=self.thoughts_per_step,
            num_stages=self.num_blocks,
        )

    def num_positions(self, row: TokenizedRow) -> int:
        """Count the positions that a row needs: one for each token."""
        return self.num_tokens(row)

    def most_tokens(self, rows: pa.Table) -> NDArray[np.int64]:
        """Return an upper bound on each row's tokens: all thoughts and the whole chain."""
        steps, separators = step_lengths(rows), list_lengths(rows["step_ids"]) * len(self.separator_ids)
        text = steps + separators + list_lengths(rows["answer_ids"])
        return list_lengths(rows["prompt_ids"]) + 2 + self.num_blocks * self.thoughts_per_step + text


class CoconutTrainer(ReadoutTrainer):
    """Trains ``- log p(r_{k+1} ... r_T, y | x, <b>, c·k thoughts, </b>)``, stage by stage ``k``.

    All stages are one training: the step determines the stage. All rows of a batch have the same number of thoughts,
    including rows with fewer steps than ``k``. The row of ``<m>`` and the adapter's ``num_blocks`` are not used. Rows
    must have steps. The evaluation loss is always the last stage's. See :class:`ReadoutTrainer` for the arguments.

    Source: arXiv 2412.06769.
    """

    config_class = CoconutConfig
    least_blocks = 0
    trains_sharded = False
    metrics_class = TextMetrics
    args: CoconutConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_model(self.model)
        self._last_stage = 0  # the last one trained
        if self.args.reset_optimizer:
            self.add_callback(_ResetOptimizer())

    @classmethod
    def objective_of(cls, args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return the objective."""
        separator_ids = separator_of(args, config, tokenizer)
        return Thoughts(config.block_tokens, args.num_stages, separator_ids, args.thoughts_per_step)

    @classmethod
    def check_model(cls, model: PeftModel) -> None:
        """Refuse a model that does not support thoughts."""
        check_thinks(model)

    def stage(self, step: int) -> int:
        """Return the stage trained at an optimiser step, counted from 0: the current one, or one drawn from all."""
        args = self.args
        random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # depends only on the step, for resuming
        if args.mix_share and float(torch.rand((), generator=random)) < args.mix_share:
            return int(torch.randint(args.num_stages + 1, (), generator=random))
        return args.stage_at(step / max(1, self.state.max_steps))

    def summed_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Return a batch's loss and the head's outputs: the current stage's, or the last stage's in evaluation."""
        mode = "train" if self.model.training else "eval"
        args = self.args
        stage = self.stage(self.state.global_step) if mode == "train" else args.num_stages
        num_thoughts = stage * args.thoughts_per_step
        labels = cut_texts(inputs, stage if stage < args.num_stages else None)
        if mode == "train":
            self._last_stage = stage
            num_tokens = int(inputs["attention_mask"].sum() + (labels != IGNORE_INDEX).sum())
            self._new_tokens += num_tokens + len(labels) * (2 + num_thoughts)
        prompt_ids, mask, labels = (
            tensor.to(args.device) for tensor in (inputs["input_ids"], inputs["attention_mask"], labels)
        )
        rim: Any = self.accelerator.unwrap_model(model)
        with record_function("rim_peft.thoughts"), self.accelerator.autocast():
            thoughts = think(rim, prompt_ids, mask, num_thoughts=num_thoughts)
        with record_function("rim_peft.forward"):
            end = labels.new_full((len(labels), 1), self._rim_config.block_tokens.end)
            # `</b>` predicts the first token of the text; the last token predicts nothing.
            text_ids = torch.cat([end, labels[:, :-1].clamp(min=0)], dim=1)
            is_label = labels != IGNORE_INDEX
            text = thoughts.followed_by(rim.get_base_model(), text_ids, is_label.long())
            no_label = labels.new_full(thoughts.last.shape[:2], IGNORE_INDEX)
            outputs = run_head(model, torch.cat([no_label, labels], dim=1), head=self._head, **text)
        metrics: Any = self._sums[mode]
        metrics.add(outputs.is_top1[:, -labels.shape[1] :], is_label)
        return -outputs.log_probs.sum(), outputs

    def figures(self, mode: str) -> dict[str, float]:
        """Return the token accuracy and, in training, the last step's stage."""
        figures = super().figures(mode)
        return {**figures, "stage": float(self._last_stage)} if mode == "train" else figures


class _ResetOptimizer(TrainerCallback):
    """Resets the optimiser's state when a stage begins; depends only on the step, so that resuming is exact."""

    def on_step_begin(
        self, args: CoconutConfig, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Clear the state if the previous step trained another stage."""
        before, now = (
            args.stage_at(max(0, step) / state.max_steps) for step in (state.global_step - 1, state.global_step)
        )
        if before != now:
            optimizer.state.clear()
