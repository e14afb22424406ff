"""The demo's frozen base: a small Llama that thinks aloud about potions, made by one command.

    python -m rim_peft.demo.base --output DIR

It learns from the train split alone: chains of thought of one to `max_length` operations, four by default
(`... Steps: Pam red, Kim blue, Tom gold`), and direct answers of one operation (`... Answer: gold`). After a while
every colour but the last is left unsaid with probability `unsaid` (`... Steps: Pam red, Kim, Tom gold`), as people
leave out results when they write: so that doing several steps without writing them exists in the base, as it does in
real models, while direct answers to longer questions stay at chance.

The defaults made the base that is shipped. Larger ones, for harder worlds, train on a GPU if there is one, in bfloat16.
A training that was stopped goes on when the same command is given again.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rim_peft.data.tasks.potions import Chain, Potions, World, split_of

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
    hidden_size: int = field(default=64, metadata={"help": "width; the feed-forward layers are three times as wide"})
    num_heads: int = field(default=4, metadata={"help": "attention heads"})
    num_colours: int = field(default=5, metadata={"help": "colours of the world, a prime"})
    num_names: int = field(default=16, metadata={"help": "people of the world"})
    distractors: int = field(default=0, metadata={"help": "statements about people who do not matter"})
    batch_size: int = field(default=64, metadata={"help": "samples per optimiser step"})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "AdamW's peak; falls over the last 30 %% of the steps"}
    )
    save_steps: int = field(default=500, metadata={"help": "optimiser steps between two saved states"})

    @property
    def world(self) -> World:
        """The world that stories are drawn from."""
        return World(num_colours=self.num_colours, num_names=self.num_names, distractors=self.distractors)

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


def build_tokenizer(world: World | None = None) -> PreTrainedTokenizerFast:
    """Return a world's word-level tokenizer, 84 tokens for the demo's, with phrases that never vary as one token.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.tokenize("Tom boils Kim's brew. What colour is Tom's brew? Answer: red")
    ['Tom', 'boils', "Kim's brew.", 'What colour is', "Tom's brew?", 'Answer:', 'red']
    >>> tokenizer.decode(tokenizer("Kim red, Tom gold").input_ids)
    'Kim red, Tom gold'
    """
    world = world or World()
    forms = [name + ending for ending in ("", "'s brew.", "'s brew is", "'s brew?") for name in world.names]
    fixed = ["<pad>", "<unk>", "<eos>", ",", ".", THINK, ANSWER, "What colour is"]
    words = [*fixed, *world.colours, *world.verbs, *forms]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=256
    )


def build_model(options: Pretraining, vocab_size: int) -> LlamaForCausalLM:
    """Return a Llama with random weights, residual outputs scaled down by depth."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Narrow models start with larger weights, so that the embeddings' products have about the same size.
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


def draw_from(rng: random.Random, length: int, split: str, world: World) -> Chain:
    """Draw a story of `length` operations from one split."""
    while split_of((chain := world.draw_chain(rng, length)).question) != split:
        pass
    return chain


def draw_sample(rng: random.Random, options: Pretraining, *, unsaid: float) -> tuple[str, str]:
    """Draw a training text as (prompt, target).

    >>> draw_sample(random.Random(3), Pretraining(direct=0.0), unsaid=0.5)[1]
    'Liv, Pam, Jon green, Hal blue'
    """
    world = options.world
    if rng.random() < options.direct:
        chain = draw_from(rng, 1, "train", world)
        return f"{chain.question} {ANSWER}", chain.colours[-1]
    chain = draw_from(rng, rng.choices(options.lengths, weights=options.lengths)[0], "train", world)
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


def train(model: Any, tokenizer: PreTrainedTokenizerFast, options: Pretraining, state: Path) -> None:
    """Train in place. Names and commas count a tenth: which colours stay unsaid is chance, not something to learn.

    Args:
        model: on the device where it trains.
        tokenizer: the world's.
        options: how it is made.
        state: folder of a training that was stopped, to go on from; it is written every `save_steps`.
    """
    rng = random.Random(f"potions base {options.seed}")
    colours = torch.tensor(tokenizer.convert_tokens_to_ids(list(options.world.colours)), device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, options.rate_at)
    first = _read_state(state, model, optimizer, schedule, rng)
    for step in range(first, options.num_steps):
        unsaid = options.unsaid_at(step)
        samples = [draw_sample(rng, options, unsaid=unsaid) for _ in range(options.batch_size)]
        ids, labels = (tensor.to(model.device) for tensor in encode(tokenizer, samples))
        learned = labels != _IGNORED
        targets = labels[learned]
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model.lm_head(model.model(ids).last_hidden_state[learned])
        weights = torch.where(torch.isin(targets, colours), 1.0, 0.1)
        loss = (functional.cross_entropy(logits.float(), targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{options.num_steps}  unsaid {unsaid:.2f}  loss {loss.item():.4f}", flush=True)
        if (step + 1) % options.save_steps == 0 and step + 1 < options.num_steps:
            _write_state(state, model, optimizer, schedule, rng, step + 1)


def _write_state(state: Path, model: Any, optimizer: Any, schedule: Any, rng: random.Random, step: int) -> None:
    """Write all that a training goes on from, at once."""
    unfinished = state.with_name(f"{state.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_model(model, str(unfinished / "model.safetensors"))
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, unfinished / "optimizer.pt")
    (unfinished / "progress.json").write_text(json.dumps({"step": step, "random": rng.getstate()}))
    shutil.rmtree(state, ignore_errors=True)
    unfinished.rename(state)


def _read_state(state: Path, model: Any, optimizer: Any, schedule: Any, rng: random.Random) -> int:
    """Go on from a state, if there is one; return the step that comes next."""
    if not state.exists():
        return 0
    load_model(model, str(state / "model.safetensors"))
    kept = torch.load(state / "optimizer.pt", map_location=model.device, weights_only=True)
    optimizer.load_state_dict(kept["optimizer"])
    schedule.load_state_dict(kept["schedule"])
    progress = json.loads((state / "progress.json").read_text())
    version, numbers, gauss = progress["random"]
    rng.setstate((version, tuple(numbers), gauss))
    print(f"going on from step {progress['step']}", flush=True)
    return int(progress["step"])


@torch.no_grad()
def measure_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    ending: str,
    *,
    world: World | None = None,
    lengths: Sequence[int] = LENGTHS,
    split: str = "validation",
    num_rows: int = 500,
) -> dict[int, float]:
    """Return the share of right answers per chain length, decoded greedily after `ending`."""
    world = world or World()
    task = Potions(**asdict(world), lengths=(1,))
    rng = random.Random(f"potions {split}")
    accuracy = {}
    for length in lengths:
        chains = [draw_from(rng, length, split, world) for _ in range(num_rows)]
        texts = [f"{chain.question} {ending}" for chain in chains]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(**prompts, max_new_tokens=3 * length + 4, do_sample=False)
        answers = tokenizer.batch_decode(output[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        gold = [chain.colours[-1] for chain in chains]
        accuracy[length] = sum(map(task.is_correct, answers, gold)) / num_rows
    return accuracy


def make_base(options: Pretraining, output: Path) -> None:
    """Pre-train a base and save weights, tokenizer and `made.json`, which says how it was made."""
    started = time.perf_counter(), time.process_time()
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer(options.world)
    model: Any = build_model(options, len(tokenizer))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    output.mkdir(parents=True, exist_ok=True)
    _check_same(options, output / "training.json")
    train(model, tokenizer, options, output / "training")
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    model.eval()
    measure = partial(measure_accuracy, model, tokenizer, world=options.world, lengths=options.lengths)
    made = {
        "command": "python -m rim_peft.demo.base --output DIR",
        "options": asdict(options),
        "parameters": model.num_parameters(),
        "seconds": {"wall": round(seconds[0]), "cpu": round(seconds[1])},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "validation": {
            "thinking": measure(THINK),
            "direct": measure(ANSWER),
        },
    }
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    (output / "training.json").unlink()
    shutil.rmtree(output / "training", ignore_errors=True)
    print(json.dumps(made["validation"], indent=2))


def _check_same(options: Pretraining, path: Path) -> None:
    """Refuse to go on with a training of other options."""
    if path.exists() and json.loads(path.read_text()) != asdict(options):
        raise SystemExit(
            f"output: {path.parent} holds a training with other options ({path.name}). Give another folder."
        )
    path.write_text(json.dumps(asdict(options)))


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
