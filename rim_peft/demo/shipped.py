"""The demo on a pretrained base: a trained adapter that ships with the package, shown without training anything.

``python -m rim_peft.demo.shipped RUN --beside FOLDER`` makes its folder of a finished training: weights rounded to
bfloat16, recipe, record and card, and what it and other methods' adapters have right on the same test rows. With the
shipped folder itself as RUN everything is judged again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoModelForCausalLM

from rim_peft.data.examples import Example
from rim_peft.demo import SHIPPED
from rim_peft.demo.showcase import (
    LENGTHS,
    count_right,
    draw_examples,
    judge_blocks,
    render,
    render_questions,
    time_ways,
)
from rim_peft.escaping import json_text
from rim_peft.evaluation.accuracy import judge_answers
from rim_peft.evaluation.latency import by_answerer, by_generate
from rim_peft.evaluation.scores import Score
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run.loading import Run, describe_asking, load_run
from rim_peft.run.named_bases import find_base
from rim_peft.run.output_folder import ADAPTER_FILE, RECIPE_FILE, listed_files, write_files
from rim_peft.run.record import render_run_card
from rim_peft.tasks.potions import Potions
from rim_peft.tuner.card import CARD_FILE
from rim_peft.tuner.files import RECORD_FILE, file_digests

RESULTS_FILE = "results.json"
_BATCH_SIZE = 32


def load_shipped() -> Run:
    """Load the adapter on its base, which is fetched if it is not on this machine.

    Raises:
        OSError: the base cannot be fetched.
    """
    return load_run(SHIPPED)


def stored_results() -> dict[str, Any]:
    """Return the figures that were measured when the adapter's folder was made."""
    results: dict[str, Any] = json.loads((SHIPPED / RESULTS_FILE).read_text(encoding="utf-8"))
    return results


def show_shipped(*, num_rows: int, seed: int, as_json: bool) -> str:
    """Return what the demo prints: accuracy on test rows, times, and a few questions with every block's readout.

    Args:
        num_rows: test rows for each number of steps.
        seed: determines which rows are drawn.
        as_json: return the figures as one JSON document instead.
    """
    run = load_shipped()
    judged = judge(run, draw_examples(num_rows, seed=seed))
    times = time_answers(run, seed=seed)
    if as_json:
        return json_text({**judged, "latency": times}, indent=2)
    stored = stored_results()
    labels = {"direct": "base, answering at once", "rim": "RiM", "written": "base, writing as many steps"}
    table = render(
        {
            **{f"{label} *": scores for label, scores in stored["others"].items()},
            "RiM, after the last block": judged["rim"],
        },
        judged["rim_by_block"],
        {label: times[key] for key, label in labels.items()},
        num_rows=num_rows,
        note="* measured before: rim_peft/demo/smollm2/README.md",
    )
    return "\n".join([table, render_questions(run, length=max(LENGTHS), seed=seed)])


def judge(run: Run, examples: list[Example]) -> dict[str, Any]:
    """Return accuracy by number of steps, after the last block (``rim``) and after each (``rim_by_block``)."""
    limit = run.answerer().max_new_tokens
    return judge_blocks(run, examples, max_new_tokens=limit, batch_size=_BATCH_SIZE)


def time_answers(run: Run, *, seed: int, num_questions: int = 16) -> dict[str, dict[str, float]]:
    """Return milliseconds to an answer of the base at once, of RiM, and of the base writing as many steps out.

    The base does not know the task; for its time, what it writes does not matter, only how many tokens.
    """
    longest = max(LENGTHS)
    rows = list(Potions(lengths=(longest,), num_held_out=num_questions, seed=seed + 1, steps="sentences").rows("test"))
    answerer = run.answerer()
    prompts = answerer.encode([row["question"] for row in rows])
    chains = [", ".join([*row["steps"], row["answer"]]) for row in rows]
    num_written = round(sum(len(run.tokenizer(f" {chain}")["input_ids"]) for chain in chains) / len(chains)) + 1
    base = AutoModelForCausalLM.from_pretrained(find_base(_base_of(run)), dtype=run.model.dtype).eval()

    def plain(name: str, num_tokens: int) -> Any:
        # The end of a text is no reason to stop here; the answer is a colour and the end.
        pad_id = run.tokenizer.pad_token_id
        return by_generate(name, prompts, base, eos_id=None, pad_id=pad_id, max_new_tokens=num_tokens, answer_tokens=2)

    ways = [plain("direct", 2), by_answerer("rim", prompts, answerer), plain("written", num_written)]
    return time_ways(run, ways, num_questions=num_questions)


def _base_of(run: Run) -> str:
    return str(run.recipe.model.name_or_path) if run.recipe is not None else ""


def make(source: Path, folder: Path, *, beside: Sequence[Path] = (), num_rows: int = 250) -> None:
    """Make the shipped folder of a finished training on a named base.

    Args:
        source: output folder of the training.
        folder: where to write; what is there is replaced.
        beside: output folders of trainings with other methods, judged on the same rows.
        num_rows: test rows for each number of steps.
    """
    run = load_run(source)
    if run.recipe is None:
        raise SystemExit(f"{source}: must be the output folder of a training")
    # Rounded, and asked in float32 wherever it is loaded: processors without bfloat16 are very slow in it.
    state = {name: value.to(torch.bfloat16) for name, value in run.model.state_dict().items()}
    recipe = replace(run.recipe, output_dir=Path(run.recipe.output_dir).name, resume=False)
    trained = run.record.get("training_dtype", recipe.model.dtype)  # as a folder says that was made here
    recipe = replace(recipe, model=replace(recipe.model, dtype="float32"))
    command = [word for word in run.record["command"] if not word.startswith(("output_dir=", "resume="))]
    record = {
        **run.record,
        "command": command,
        "asked": describe_asking(recipe),
        "training_dtype": trained,
    }

    def save(partial: Path) -> None:
        run.model.peft_config["default"].base_model_name_or_path = _base_of(run)
        run.model.save_pretrained(str(partial), save_embedding_layers=False, state_dict=state)
        for path in partial.iterdir():  # the base has the tokenizer
            if path.name not in (ADAPTER_FILE, SAFETENSORS_WEIGHTS_NAME):
                path.unlink()
        text = write_yaml(resolve(recipe))
        (partial / RECIPE_FILE).write_text(text, encoding="utf-8")
        record["files"] = file_digests(partial, listed_files(partial))
        (partial / RECORD_FILE).write_text(json_text(record, indent=2) + "\n", encoding="utf-8")
        results = _measure(load_run(partial), beside, num_rows=num_rows)
        (partial / RESULTS_FILE).write_text(json_text(results, indent=2) + "\n", encoding="utf-8")
        card = render_run_card(folder.name, record, text)
        section = f"\n## Test\n\n{_describe(results, trained)}\n\n## Training\n"
        (partial / CARD_FILE).write_text(card.replace("\n## Training\n", section, 1), encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, save, last=ADAPTER_FILE)


def _describe(results: dict[str, Any], dtype: str) -> str:
    """Return the card's section about test rows."""
    rows = {**results["others"], "RiM, after the last block": results["rim"]}
    cells = [
        f"| {label} | {scores.get('num_samples', '–')} | "
        + " | ".join(f"{scores[str(length)]['accuracy']:.2f}" for length in LENGTHS)
        + " |"
        for label, scores in rows.items()
    ]
    head = ["", "samples", *(f"{length} step{'s' if length > 1 else ''}" for length in LENGTHS)]
    return "\n".join(
        [
            f"Accuracy on {results['num_rows']} test rows for each number of steps; chance is 0.20. The base gets 50 "
            "of them, with four training rows in its prompt.",
            "",
            f"| {' | '.join(head)} |",
            f"|---|{'---:|' * (len(head) - 1)}",
            *cells,
            "",
            f"Trained on the base in {dtype}; the weights were then rounded to bfloat16, and RiM's figures are of the "
            "rounded weights on the base in float32. A LoRA beside it is asked on the base as it was trained on.",
        ]
    )


def _measure(run: Run, beside: Sequence[Path], *, num_rows: int) -> dict[str, Any]:
    """Return what is stored: accuracy of the adapter, of the base with examples in its prompt, and of other runs."""
    examples = draw_examples(num_rows)
    rim = judge(run, examples)
    rim["rim"]["num_samples"] = run.record["training"]["num_samples"]
    others = {"base, four examples": _judge_few_shot(run, examples)}
    for folder in beside:
        other = load_run(folder)
        report = judge_answers(
            other.answerer(), examples, Potions(), batch_size=_BATCH_SIZE, progress=True, separator=other.separator
        )
        label = {"answer": "LoRA, answering at once", "cot": "LoRA, writing its steps"}[other.record["method"]]
        others[label] = {str(length): score.to_dict() for length, score in report.by_length.items()}
        others[label]["num_samples"] = other.record["training"]["num_samples"]
    return {"num_rows": num_rows, **rim, "others": others}


def _judge_few_shot(run: Run, examples: list[Example]) -> dict[str, Any]:
    """Return the base's accuracy by number of steps, with one answered training question of each length before.

    On the first 50 examples of each length: prompts are five times as long, and its answers are guesses.
    """
    form = run.templates.prompt
    shown = [next(Potions(lengths=(length,)).rows("train")) for length in LENGTHS]
    before = "".join(f"{form.format(question=row['question'])} {row['answer']}\n\n" for row in shown)
    scores = {}
    with run.model.disable_adapter():
        for length in LENGTHS:
            chosen = [example for example in examples if len(example.steps or ()) == length][:50]
            right = 0
            for start in range(0, len(chosen), _BATCH_SIZE):
                batch = chosen[start : start + _BATCH_SIZE]
                prompts = [before + form.format(question=example.question) for example in batch]
                gold = [example.answer for example in batch]
                right += count_right(run.model, run.tokenizer, prompts, gold, max_new_tokens=2)
            scores[str(length)] = Score(right, len(chosen)).to_dict()
    return scores


def main() -> None:
    """Make the folder that ships."""
    parser = argparse.ArgumentParser(prog="python -m rim_peft.demo.shipped", description=main.__doc__)
    parser.add_argument("source", type=Path, metavar="RUN", help="output folder of the training")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], metavar="FOLDER", help="other methods' trainings")
    parser.add_argument("--out", type=Path, default=SHIPPED, metavar="FOLDER", help="where to write (%(default)s)")
    parser.add_argument("--num-rows", type=int, default=250, help="test rows for each number of steps (%(default)s)")
    args = parser.parse_args()
    make(args.source, args.out, beside=args.beside, num_rows=args.num_rows)


if __name__ == "__main__":
    main()
