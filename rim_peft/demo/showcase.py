"""The whole demo: train, judge on held-out rows beside the alternatives, and show what the blocks hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from rim_peft.data.examples import Example, read_example
from rim_peft.demo import BASE, FOLDER, RECIPE
from rim_peft.demo.pretraining import ANSWER, THINK
from rim_peft.evaluation import evaluate_accuracy
from rim_peft.evaluation.latency import Way, by_generate, measure_latency
from rim_peft.evaluation.scores import Score
from rim_peft.inference import read_blocks
from rim_peft.recipe import Recipe, load_recipe
from rim_peft.run import Run, train_or_load
from rim_peft.run.rows import load_rows
from rim_peft.tasks.potions import Potions


def train_answer_only(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, base: str, folder: Path) -> PeftModel:
    """Train LoRA on question → answer, with as many samples as both stages of the recipe see together.

    Args:
        recipe: the demo's recipe, which sets rank, rows, batch, learning rate and number of samples.
        tokenizer: the base's tokenizer.
        base: folder of the frozen base.
        folder: the trainer's output folder.
    """
    stages: list[Any] = [stage for _, stage in recipe.stage_trainers()]
    first = stages[0]
    samples = sum(stage.max_steps * stage.per_device_train_batch_size for stage in stages)
    rank = recipe.rim_config()
    set_seed(recipe.seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank.r, lora_alpha=rank.lora_alpha, target_modules=rank.target_modules, task_type="CAUSAL_LM"),
    )
    templates = recipe.data.templates
    rows = load_rows(recipe.data, recipe.task()).train
    pairs = [
        {"prompt": templates.prompt.format(question=row["question"]), "completion": f" {row['answer']}"} for row in rows
    ]
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=samples // first.per_device_train_batch_size,
        per_device_train_batch_size=first.per_device_train_batch_size,
        learning_rate=first.learning_rate,
        # What recipes/compare/demo.yaml found for answering at once: stage 1's rate, but falling to zero.
        lr_scheduler_type="linear",
        warmup_steps=first.warmup_steps,
        seed=recipe.seed,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=200,
    )
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    return model.eval()


def count_right(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], gold: list[str], *, max_new_tokens: int
) -> int:
    """Count the correct greedy answers of a model without blocks."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(Potions().is_correct, texts, gold))


LENGTHS = Potions().lengths
STORED = FOLDER / "results.json"
"""Figures of runs that take too long for every demo, with the commands that made them."""


def train_demo(folder: Path, *, seed: int, overrides: list[str], command: list[str]) -> Run:
    """Train the demo's recipe into a folder, resume it if it was stopped, or load it if it is finished."""
    return train_or_load(demo_recipe(folder, seed=seed, overrides=overrides), command=command)


def demo_recipe(folder: Path, *, seed: int, overrides: list[str]) -> Recipe:
    """Return the demo's recipe for a folder. Paths are quoted because overrides are YAML."""
    given = [f"model.name_or_path={json.dumps(str(BASE))}", f"output_dir={json.dumps(str(folder))}", f"seed={seed}"]
    return load_recipe(RECIPE, [*given, *overrides])


def judge(run: Run, *, num_rows: int, seed: int = 1) -> dict[str, Any]:
    """Return accuracy by chain length on test rows: RiM by block, and the base thinking aloud or answering at once.

    Args:
        run: the trained adapter.
        num_rows: test rows for each chain length.
        seed: determines which rows of the test split are drawn.
    """
    examples = draw_examples(num_rows, seed=seed)
    judged = judge_blocks(run, examples, max_new_tokens=2, batch_size=64)
    with run.model.disable_adapter():
        return {
            **judged,
            "thinking": judge_plain(run.model, run.tokenizer, examples, ending=THINK),
            "direct": judge_plain(run.model, run.tokenizer, examples, ending=ANSWER),
        }


def judge_blocks(run: Run, examples: list[Example], *, max_new_tokens: int, batch_size: int) -> dict[str, Any]:
    """Return RiM's accuracy by chain length, after the last block (``rim``) and after each (``rim_by_block``)."""
    report = evaluate_accuracy(
        run.model,
        run.tokenizer,
        examples,
        Potions(),
        templates=run.templates,
        by_block=True,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=True,
    )
    return {
        "rim": {str(length): score.to_dict() for length, score in report.by_length.items()},
        "rim_by_block": [
            {str(length): score.to_dict() for length, score in block.items() if length != "all"}
            for block in report.by_block
        ],
    }


def judge_plain(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[Example], *, ending: str
) -> dict[str, dict[str, float]]:
    """Return accuracy by chain length of a model's texts after ``ending``, without blocks.

    Answers at once get as many tokens as RiM's: in a longer text, a later colour would be judged instead of the answer.
    """
    scores = {}
    for length in LENGTHS:
        chosen = [example for example in examples if len(example.steps or ()) == length]
        prompts = [f"{example.question} {ending}" for example in chosen]
        gold = [example.answer for example in chosen]
        right = count_right(model, tokenizer, prompts, gold, max_new_tokens=2 if ending == ANSWER else 3 * length + 4)
        scores[str(length)] = Score(right, len(chosen)).to_dict()
    return scores


def draw_examples(num_rows: int, *, seed: int = 1) -> list[Example]:
    """Return ``num_rows`` examples of the test split for each chain length."""
    return [
        read_example(row)
        for length in LENGTHS
        for row in Potions(lengths=(length,), num_held_out=num_rows, seed=seed).rows("test")
    ]


def judge_answer_only(*, seed: int, num_rows: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train LoRA without blocks on as many samples as RiM, and return its accuracy by chain length."""
    recipe = demo_recipe(folder, seed=seed, overrides=overrides)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = train_answer_only(recipe, tokenizer, base=str(BASE), folder=folder)
    return judge_plain(model, tokenizer, draw_examples(num_rows), ending=ANSWER)


def time_answers(run: Run, *, num_questions: int = 33) -> dict[str, dict[str, float]]:
    """Return milliseconds to an answer of the base at once, of RiM, and of the base thinking aloud, one at a time."""
    longest = max(LENGTHS)
    rows = Potions(lengths=(longest,), num_held_out=num_questions, seed=2).rows("test")
    questions = [row["question"] for row in rows]
    device = run.model.device
    base = AutoModelForCausalLM.from_pretrained(BASE).to(device).eval()

    def way(name: str, model: Any, ending: str, *, max_new_tokens: int) -> Way:
        prompts = [run.tokenizer(f"{question} {ending}")["input_ids"] for question in questions]
        # A colour is one token, and EOS follows it.
        return by_generate(
            name,
            prompts,
            model,
            eos_id=run.tokenizer.eos_token_id,
            pad_id=run.tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            answer_tokens=2,
        )

    ways = [
        way("direct", base, ANSWER, max_new_tokens=2),
        way("rim", run.model, ANSWER, max_new_tokens=2),
        way("thinking", base, THINK, max_new_tokens=3 * longest + 4),
    ]
    return time_ways(run, ways, num_questions=num_questions)


def time_ways(run: Run, ways: list[Way], *, num_questions: int) -> dict[str, dict[str, float]]:
    """Return milliseconds to the first token and to the whole answer of each way, and the tokens it writes.

    LoRA is merged, the memory rows stay in place: as an adapter is served.
    """
    run.model.merge_adapter()
    try:
        return {
            latency.name: {
                "first_token_ms": latency.first_token_ms,
                "answer_ms": latency.answer_ms,
                "num_tokens": latency.num_tokens,
            }
            for latency in measure_latency(ways, num_questions=num_questions)
        }
    finally:
        run.model.unmerge_adapter()


def stored_figures() -> dict[str, Any]:
    """Return the figures shipped with the package."""
    return json.loads(STORED.read_text(encoding="utf-8"))


def show_demo(judged: dict[str, Any], times: dict[str, Any], stored: dict[str, Any], *, num_rows: int) -> str:
    """Return the demo's table as text."""
    direct, written = "base, answering at once", "base, writing its steps out"
    return render(
        {
            direct: judged["direct"],
            written: judged["thinking"],
            "answer-only LoRA (stored *)": stored["answer_only"]["accuracy"],
            "RiM, after the last block": judged["rim"],
        },
        judged["rim_by_block"],
        {direct: times["direct"], "RiM": times["rim"], written: times["thinking"]},
        num_rows=num_rows,
        note=f"* not trained now: {stored['answer_only']['command']} trains and judges it again",
    )


def render(
    accuracies: Mapping[str, Mapping[str, Any]],
    blocks: Sequence[Mapping[str, Any]],
    times: Mapping[str, Mapping[str, float]],
    *,
    num_rows: int,
    note: str,
) -> str:
    """Return a table of accuracies by number of steps, of RiM's blocks, and of times.

    Args:
        accuracies: scores by number of steps, of each row of the table by its label.
        blocks: the same of the readout after each block.
        times: milliseconds and tokens of each way by its label, from :func:`time_ways`.
        num_rows: questions for each number of steps.
        note: last line.
    """
    lines = [
        f"Right answers by number of steps, on {num_rows} held-out questions each (± standard error; chance 0.20)",
        _row("", [f"{length} step{'s' if length > 1 else ''}" for length in LENGTHS]),
        *(_row(label, _cells(scores)) for label, scores in accuracies.items()),
        "",
        "RiM's readout after each block",
        *(_row(f"  block {number}", _cells(block, with_error=False)) for number, block in enumerate(blocks, start=1)),
        "",
        f"Milliseconds for a question of {max(LENGTHS)} steps, one at a time (median; LoRA merged)",
        _row("", ["first token", "whole answer", "tokens"]),
    ]
    for label, value in times.items():
        cells = [f"{value['first_token_ms']:.1f}", f"{value['answer_ms']:.1f}", f"{value['num_tokens']:.0f}"]
        lines.append(_row(label, cells))
    return "\n".join([*lines, note])


def render_questions(run: Run, *, length: int = max(LENGTHS) - 1, seed: int = 3) -> str:
    """Return three questions of the test split with the readout after each block."""
    rows = list(Potions(lengths=(length,), num_held_out=3, seed=seed).rows("test"))
    questions = [row["question"] for row in rows]
    readouts = read_blocks(run.model, run.tokenizer, questions, templates=run.templates, max_new_tokens=2)
    lines = []
    for row, blocks in zip(rows, readouts, strict=True):
        lines.append(f"\n{row['question']}")
        lines.append(f"  true colours on the way: {' → '.join([*row['steps'], row['answer']])}")
        lines.append(f"  read out after each block: {' | '.join(block.text for block in blocks)}")
    return "\n".join(lines)


def _row(label: str, cells: list[str]) -> str:
    return f"{label:30}" + "".join(f"{cell:>14}" for cell in cells)


def _cells(scores: Mapping[str, Any], *, with_error: bool = True) -> list[str]:
    cells = []
    for length in LENGTHS:
        score = scores[str(length)]
        error = f" ± {score['standard_error']:.2f}" if with_error else ""
        cells.append(f"{score['accuracy']:.2f}{error}")
    return cells
