"""The demo's frozen base: a small Llama that thinks aloud about potions, made by one command.

    python -m rim_peft.demo.base --output DIR

It learns from the train split alone: chains of thought of one to `max_length` operations, four by default
(`... Steps: Pam red, Kim blue, Tom gold`), and direct answers of one operation (`... Answer: gold`). After a while
every colour but the last is left unsaid with probability `unsaid` (`... Steps: Pam red, Kim, Tom gold`), as people
leave out results when they write: so that doing several steps without writing them exists in the base, as it does in
real models, while direct answers to longer questions stay at chance.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rim_peft.data.tasks.potions import COLOURS, NAMES, VERBS, Chain, draw_chain, is_correct, split_of

THINK, ANSWER = "Steps:", "Answer:"
"""The two endings of a prompt: think aloud, or answer at once."""

LENGTHS = (1, 2, 3, 4)
_WORDS = Regex(r"What colour is|\w+'s brew is|\w+'s brew[.?]|\w+:?|[^\w\s]")
_IGNORED = -100


@dataclass(frozen=True)
class Pretraining:
    """How the base is made; the defaults made the one that is shipped."""

    seed: int = field(default=0, metadata={"help": "seed of weights and samples"})
    num_steps: int = field(default=2300, metadata={"help": "optimiser steps"})
    plain_steps: int = field(
        default=450, metadata={"help": "steps on complete chains of thought, before colours are left unsaid"}
    )
    unsaid: float = field(
        default=0.4, metadata={"help": "probability with which a colour but the last is left unsaid in the end"}
    )
    direct: float = field(default=0.12, metadata={"help": "share of samples that answer one operation directly"})
    max_length: int = field(default=4, metadata={"help": "operations of the longest chain of thought"})
    num_layers: int = field(default=14, metadata={"help": "decoder layers"})
    batch_size: int = field(default=64, metadata={"help": "samples per optimiser step"})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "AdamW's peak; falls over the last 30 %% of the steps"}
    )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of operations to draw from, each as often as it is long."""
        return tuple(range(1, self.max_length + 1))

    def unsaid_at(self, step: int) -> float:
        """Return how often colours are left unsaid at a step: never, then rising over 300 steps to `unsaid`."""
        return self.unsaid * min(1.0, max(0.0, (step - self.plain_steps) / 300))

    def rate_at(self, step: int) -> float:
        """Return the learning rate at a step as a share of its peak."""
        return min(1.0, (step + 1) / 100, (self.num_steps - step) / (0.3 * self.num_steps))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: 84 tokens, with phrases that never vary as one token.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.tokenize("Tom boils Kim's brew. What colour is Tom's brew? Answer: red")
    ['Tom', 'boils', "Kim's brew.", 'What colour is', "Tom's brew?", 'Answer:', 'red']
    >>> tokenizer.decode(tokenizer("Kim red, Tom gold").input_ids)
    'Kim red, Tom gold'
    """
    forms = [name + ending for ending in ("", "'s brew.", "'s brew is", "'s brew?") for name in NAMES]
    words = ["<pad>", "<unk>", "<eos>", ",", ".", THINK, ANSWER, "What colour is", *COLOURS, *VERBS, *forms]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=256
    )


def build_model(num_layers: int, vocab_size: int) -> LlamaForCausalLM:
    """Return a Llama of width 64 with random weights, residual outputs scaled down by depth."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * num_layers) ** -0.5)
    return model


def draw_from(rng: random.Random, length: int, split: str) -> Chain:
    """Draw a story of `length` operations from one split."""
    while split_of((chain := draw_chain(rng, length)).question) != split:
        pass
    return chain


def draw_sample(
    rng: random.Random, *, unsaid: float, direct: float, lengths: Sequence[int] = LENGTHS
) -> tuple[str, str]:
    """Draw a training text as (prompt, target).

    >>> draw_sample(random.Random(3), unsaid=0.5, direct=0.0)[1]
    'Liv, Pam, Jon green, Hal blue'
    """
    if rng.random() < direct:
        chain = draw_from(rng, 1, "train")
        return f"{chain.question} {ANSWER}", chain.colours[-1]
    chain = draw_from(rng, rng.choices(lengths, weights=lengths)[0], "train")
    *earlier, last = chain.thoughts
    said = [thought.split()[0] if rng.random() < unsaid else thought for thought in earlier]
    return f"{chain.question} {THINK}", ", ".join([*said, last])


def encode(tokenizer: PreTrainedTokenizerFast, samples: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded input ids and labels, both (B, S): only the target and its EOS are learned."""
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


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: Pretraining) -> None:
    """Train in place. Names and commas count a tenth: which colours stay unsaid is chance, not something to learn."""
    rng = random.Random(f"potions base {options.seed}")
    colours = torch.tensor(tokenizer.convert_tokens_to_ids(list(COLOURS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, options.rate_at)
    for step in range(options.num_steps):
        unsaid = options.unsaid_at(step)
        samples = [
            draw_sample(rng, unsaid=unsaid, direct=options.direct, lengths=options.lengths)
            for _ in range(options.batch_size)
        ]
        ids, labels = encode(tokenizer, samples)
        learned = labels != _IGNORED
        targets = labels[learned]
        logits = model.lm_head(model.model(ids).last_hidden_state[learned])
        weights = torch.where(torch.isin(targets, colours), 1.0, 0.1)
        loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{options.num_steps}  unsaid {unsaid:.2f}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def measure_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    ending: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    split: str = "validation",
    num_rows: int = 500,
) -> dict[int, float]:
    """Return the share of right answers per chain length, decoded greedily after `ending`."""
    rng = random.Random(f"potions {split}")
    accuracy = {}
    for length in lengths:
        chains = [draw_from(rng, length, split) for _ in range(num_rows)]
        prompts = tokenizer([f"{chain.question} {ending}" for chain in chains], return_tensors="pt")
        texts = model.generate(**prompts, max_new_tokens=3 * length + 4, do_sample=False)[
            :, prompts.input_ids.shape[1] :
        ]
        answers = tokenizer.batch_decode(texts, skip_special_tokens=True)
        accuracy[length] = sum(map(is_correct, answers, [chain.colours[-1] for chain in chains])) / num_rows
    return accuracy


def make_base(options: Pretraining, output: Path) -> None:
    """Pre-train a base and save weights, tokenizer and `made.json`, which says how it was made."""
    started = time.perf_counter(), time.process_time()
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(options.num_layers, len(tokenizer))
    train(model, tokenizer, options)
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    model.eval()
    made = {
        "command": "python -m rim_peft.demo.base --output DIR",
        "options": asdict(options),
        "parameters": model.num_parameters(),
        "seconds": {"wall": round(seconds[0]), "cpu": round(seconds[1])},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "validation": {
            "thinking": measure_accuracy(model, tokenizer, THINK, lengths=options.lengths),
            "direct": measure_accuracy(model, tokenizer, ANSWER, lengths=options.lengths),
        },
    }
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made["validation"], indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m rim_peft.demo.base", description="Pre-train the demo's base.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    for option in fields(Pretraining):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(
            flag, type=type(option.default), default=option.default, help=option.metadata["help"] + " (%(default)s)"
        )
    values = vars(parser.parse_args(arguments))
    output = values.pop("output")
    make_base(Pretraining(**values), output)


if __name__ == "__main__":
    main()
