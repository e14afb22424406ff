"""Pre-train bases for the generated tasks: options, model and training loop.

What all tasks share is here: options, model, training loop and saved states. A subclass of :class:`Pretraining` defines
a task's stories and the words they need.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rim_peft.tasks.stories import split_of
from rim_peft.tuner.tensors import not_finite

THINK, ANSWER = "Steps:", "Answer:"
"""The two endings of a prompt: think aloud, or answer at once."""

_IGNORED = -100


class Told(Protocol):
    """A story, as far as all tasks' stories are alike."""

    @property
    def question(self) -> str:
        """The text of the story and its question."""

    @property
    def answer(self) -> str:
        """The direct answer."""


Story = TypeVar("Story", bound=Told)


@dataclass(frozen=True)
class Pretraining(ABC, Generic[Story]):
    """How to make a base, and its task's stories."""

    task: ClassVar[str]
    pattern: ClassVar[str]
    """Regular expression of the texts that are single tokens."""

    seed: int = field(default=0, metadata={"help": "seed of weights and samples"})
    num_steps: int = field(default=2300, metadata={"help": "optimiser steps"})
    plain_steps: int = field(
        default=450, metadata={"help": "steps on complete chains of thought, before results are omitted"}
    )
    unsaid: float = field(default=0.4, metadata={"help": "final probability of omitting a result other than the last"})
    direct: float = field(default=0.12, metadata={"help": "share of samples that answer one step directly"})
    max_length: int = field(default=4, metadata={"help": "steps of the longest chain of thought"})
    num_layers: int = field(default=14, metadata={"help": "decoder layers"})
    hidden_size: int = field(default=64, metadata={"help": "width; the feed-forward layers are three times as wide"})
    num_heads: int = field(default=4, metadata={"help": "attention heads"})
    batch_size: int = field(default=64, metadata={"help": "samples per optimiser step"})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "AdamW's peak; falls over the last 30 %% of the steps"}
    )
    save_steps: int = field(default=500, metadata={"help": "optimiser steps between two saved states"})

    @property
    @abstractmethod
    def words(self) -> list[str]:
        """The task's tokens: every text that `pattern` finds in its stories, except the two endings."""

    @property
    @abstractmethod
    def results(self) -> list[str]:
        """Tokens that a chain works out. All others count a tenth in training: which results are omitted is chance."""

    @abstractmethod
    def draw_story(self, rng: random.Random, length: int) -> Story:
        """Draw a story of `length` steps from any split."""

    @abstractmethod
    def write_chain(self, rng: random.Random, story: Story, *, unsaid: float) -> str:
        """Return a story's chain of thought, with each result but the last omitted with probability `unsaid`."""

    @abstractmethod
    def is_right(self, text: str, gold: str) -> bool:
        """Return whether a generated text, with or without a chain of thought, ends with the answer `gold`."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of steps to draw from, each as often as its size."""
        return tuple(range(1, self.max_length + 1))

    def draw_from(self, rng: random.Random, length: int, split: str) -> Story:
        """Draw a story of `length` steps from one split."""
        while split_of((story := self.draw_story(rng, length)).question) != split:
            pass
        return story

    def draw_sample(self, rng: random.Random, *, unsaid: float) -> tuple[str, str]:
        """Draw a training text as (prompt, target)."""
        if rng.random() < self.direct:
            story = self.draw_from(rng, 1, "train")
            return f"{story.question} {ANSWER}", story.answer
        story = self.draw_from(rng, rng.choices(self.lengths, weights=self.lengths)[0], "train")
        return f"{story.question} {THINK}", self.write_chain(rng, story, unsaid=unsaid)

    def unsaid_at(self, step: int) -> float:
        """Return the probability of omitting results at a step: 0 at first, then rising over 300 steps to `unsaid`."""
        return self.unsaid * min(1.0, max(0.0, (step - self.plain_steps) / 300))

    def rate_at(self, step: int) -> float:
        """Return the learning rate at a step as a share of its peak."""
        return min(1.0, (step + 1) / 100, (self.num_steps - step) / (0.3 * self.num_steps))


def build_tokenizer(options: Pretraining[Any]) -> PreTrainedTokenizerFast:
    """Return a task's word-level tokenizer; phrases that never vary are single tokens."""
    words = ["<pad>", "<unk>", "<eos>", ",", ".", THINK, ANSWER, *options.words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(options.pattern), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=256
    )


def build_model(options: Pretraining[Any], vocab_size: int) -> LlamaForCausalLM:
    """Return a Llama with random weights, its residual outputs scaled down by depth."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Narrow models start with larger weights, so that products of embeddings have about the same size.
        initializer_range=0.08 * (64 / options.hidden_size) ** 0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * options.num_layers) ** -0.5)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, samples: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded input ids and labels, both (B, S); only the target and its EOS have labels."""
    prompts = tokenizer([prompt for prompt, _ in samples]).input_ids
    targets = tokenizer([target for _, target in samples]).input_ids
    longest = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
    ids = torch.full((len(samples), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, _IGNORED)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        end = len(prompt) + len(target)
        ids[row, :end] = torch.tensor(prompt + target)
        labels[row, len(prompt) - 1 : end] = torch.tensor([*target, tokenizer.eos_token_id])
    return ids, labels


def train(model: Any, tokenizer: PreTrainedTokenizerFast, options: Pretraining[Any], state: Path) -> dict[str, float]:
    """Train in place. Tokens other than results count a tenth: which results are omitted is chance.

    Args:
        model: on its training device.
        tokenizer: the task's tokenizer.
        options: how the base is made.
        state: state file; training resumes from it if it exists, and writes it every `save_steps` and at the end.

    Returns:
        Seconds of the training, including what it resumed from, "wall" and "cpu".

    Raises:
        ValueError: the loss or weights are no longer finite.
    """
    rng = random.Random(f"{options.task} base {options.seed}")
    results = torch.tensor(tokenizer.convert_tokens_to_ids(options.results), device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, options.rate_at)
    first, before = _read_state(state, model, optimizer, schedule, rng)
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    started = {name: clock() - before[name] for name, clock in clocks.items()}
    seconds = before
    for step in range(first, options.num_steps):
        unsaid = options.unsaid_at(step)
        samples = [options.draw_sample(rng, unsaid=unsaid) for _ in range(options.batch_size)]
        ids, labels = (tensor.to(model.device) for tensor in encode(tokenizer, samples))
        learned = labels != _IGNORED
        targets = labels[learned]
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model.lm_head(model.model(ids).last_hidden_state[learned])
        weights = torch.where(torch.isin(targets, results), 1.0, 0.1)
        loss = (functional.cross_entropy(logits.float(), targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            _check_finite(loss, step + 1)
            print(f"step {step + 1}/{options.num_steps}  unsaid {unsaid:.2f}  loss {loss.item():.4f}", flush=True)
        if (step + 1) % options.save_steps == 0 or step + 1 == options.num_steps:
            seconds = {name: clock() - started[name] for name, clock in clocks.items()}
            _check_finite(loss, step + 1, model)
            _write_state(state, model, optimizer, schedule, rng, step + 1, seconds)
    return seconds


def _check_finite(loss: torch.Tensor, step: int, model: Any = None) -> None:
    found = not_finite({"the loss": loss.detach(), **(dict(model.named_parameters()) if model is not None else {})})
    if found is not None:
        raise ValueError(
            f"loss and weights must stay finite, at step {step} {found}. Lower --learning-rate in another output."
        )


def _write_state(
    path: Path,
    model: Any,
    optimizer: Any,
    schedule: Any,
    rng: random.Random,
    step: int,
    seconds: dict[str, float],
) -> None:
    """Write everything needed to resume a training, atomically."""
    unfinished = path.with_suffix(".partial")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**states, "random": rng.getstate(), "step": step, "seconds": seconds}, unfinished)
    unfinished.replace(path)


def _read_state(
    path: Path, model: Any, optimizer: Any, schedule: Any, rng: random.Random
) -> tuple[int, dict[str, float]]:
    """Resume from a state if there is one; return the next step, and the seconds spent so far."""
    if not path.exists():
        return 0, {"wall": 0.0, "cpu": 0.0}
    kept = torch.load(path, map_location=model.device, weights_only=True)
    for name, part in {"model": model, "optimizer": optimizer, "schedule": schedule}.items():
        part.load_state_dict(kept[name])
    rng.setstate(kept["random"])
    print(f"resuming from step {kept['step']}", flush=True)
    return int(kept["step"]), kept["seconds"]
