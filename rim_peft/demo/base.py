"""Train bases from scratch on the generated tasks: the demo's, and larger ones for harder worlds.

    python -m rim_peft.demo.base --output-dir DIR
    python -m rim_peft.demo.base --task ontology --output-dir DIR

A base learns from the train split only: chains of thought of one to `max_length` steps (`... Steps: Pam red, Kim blue,
Tom gold`), and direct answers to questions of one step (`... Answer: gold`). After a while every result but the last is
omitted with probability `unsaid` (`... Steps: Pam red, Kim, Tom gold`), as people omit results when they write. So the
base can do several steps without writing them, as real models can, while direct answers to longer questions stay at
chance.

The defaults made the base that is shipped. Larger ones train on a GPU if there is one, in bfloat16. Rerun the command
to resume a stopped training.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from rim_peft.demo.pretraining import ANSWER, THINK, Pretraining, build_model, build_tokenizer, train
from rim_peft.demo.task_bases import BASES
from rim_peft.tuner.files import read_object

DEFAULT = "potions"
"""The demo's own task."""
MADE = "made.json"
"""File that says how a base was made; the base is finished if it exists."""


@torch.no_grad()
def measure_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    ending: str,
    *,
    options: Pretraining[Any],
    num_rows: int = 500,
) -> dict[int, float]:
    """Return accuracy per chain length on validation questions, decoded greedily after `ending`."""
    rng = random.Random(f"{options.task} validation")
    accuracy = {}
    for length in options.lengths:
        stories = [options.draw_from(rng, length, "validation") for _ in range(num_rows)]
        texts = [f"{story.question} {ending}" for story in stories]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        gold = [story.answer for story in stories]
        # Text after the direct answer would be judged instead of it.
        longest = max(len(ids) for ids in tokenizer(gold)["input_ids"]) + 1
        num_tokens = longest if ending == ANSWER else 3 * length + 4
        output = model.generate(**prompts, max_new_tokens=num_tokens, do_sample=False)
        answers = tokenizer.batch_decode(output[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        accuracy[length] = sum(map(options.is_right, answers, gold)) / num_rows
    return accuracy


def make_base(options: Pretraining[Any], output: Path) -> None:
    """Pre-train a base and save weights, tokenizer and `made.json`, the record of how it was made."""
    if (output / MADE).exists():
        raise SystemExit(f"output: {output} holds a finished base ({MADE}). Give another folder.")
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer(options)
    model: Any = build_model(options, len(tokenizer))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    output.mkdir(parents=True, exist_ok=True)
    _check_same(options, output / "training.json")
    seconds = train(model, tokenizer, options, output / "training.pt")
    model.eval()
    task = "" if options.task == DEFAULT else f" --task {options.task}"
    made = {
        "command": f"python -m rim_peft.demo.base{task} --output-dir DIR",
        "options": asdict(options),
        "parameters": model.num_parameters(),
        "seconds": {clock: round(taken) for clock, taken in seconds.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "validation": {
            "thinking": measure_accuracy(model, tokenizer, THINK, options=options),
            "direct": measure_accuracy(model, tokenizer, ANSWER, options=options),
        },
    }
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / MADE).write_text(json.dumps(made, indent=2) + "\n")
    for name in ("training.json", "training.pt"):
        (output / name).unlink()
    print(json.dumps(made["validation"], indent=2))


def _check_same(options: Pretraining[Any], path: Path) -> None:
    """Refuse to resume a training with other options."""
    if path.exists() and read_object(path, remedy="Delete the folder.") != asdict(options):
        raise SystemExit(
            f"output: {path.parent} holds a training with other options ({path.name}). Give another folder."
        )
    path.write_text(json.dumps(asdict(options)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument(
        "--task",
        choices=sorted(BASES),
        default=DEFAULT,
        help="task that provides the stories; each has its own options (%(default)s)",
    )
    kind = BASES[chooser.parse_known_args(arguments)[0].task]
    parser = argparse.ArgumentParser(
        prog="python -m rim_peft.demo.base",
        description="Pre-train the demo's base, or one for another generated task.",
        parents=[chooser],
    )
    parser.add_argument("--output-dir", "--output", type=Path, required=True, help="folder to write into")
    for option in fields(kind):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(
            flag, type=type(option.default), default=option.default, help=option.metadata["help"] + " (%(default)s)"
        )
    values = vars(parser.parse_args(arguments))
    output = values.pop("output_dir")
    del values["task"]
    make_base(kind(**values), output)


if __name__ == "__main__":
    main()
