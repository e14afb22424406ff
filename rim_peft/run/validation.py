"""Validation of a run while it trains: scores, and what blocks read out on a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Question
from rim_peft.evaluation import AccuracyReport
from rim_peft.evaluation.accuracy import judge_answers
from rim_peft.evaluation.answers import AnswerReader, with_writable_answers
from rim_peft.inference import Answerer, BlockAnswerer
from rim_peft.inference.decoding import can_decode
from rim_peft.recipe import Recipe
from rim_peft.run.loading import Run
from rim_peft.run.rows import RunRows, check_validation, read_examples
from rim_peft.tasks.task import Task
from rim_peft.training.samples import Sample, spread

_MOST_BLOCKS = 16


@dataclass(frozen=True)
class Validation:
    """Scores a model by its greedy answers after the last block on the validation rows."""

    recipe: Recipe
    examples: Sequence[Example]
    task: Task
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def make(cls, recipe: Recipe, rows: RunRows, task: Task, tokenizer: PreTrainedTokenizerBase) -> Validation | None:
        """Return a run's validation; None without validation rows.

        Raises:
            ValueError: there are bad rows, or no good one.
        """
        if rows.validation is None:
            return None
        examples = read_examples(rows.validation, on_bad_rows=recipe.data.on_bad_rows)
        check_validation(examples)
        return cls(recipe, examples, task, tokenizer)

    def __call__(self, model: PeftModel) -> dict[str, float]:
        """Return the score that chooses the best weights."""
        return {"accuracy": self.report(model).final.accuracy}

    def report(self, model: PeftModel, *, progress: bool = False) -> AccuracyReport:
        """Return the whole report."""
        run = Run(model, self.tokenizer, self.recipe)
        return judge_answers(
            run.answerer(),
            self.examples,
            self.task,
            batch_size=self.recipe.evaluation.batch_size,
            progress=progress,
            separator=run.separator,
        )

    def read_samples(self, model: PeftModel) -> list[Sample]:
        """Read out the first rows, as many as ``evaluation.sample_rows`` says."""
        options = self.recipe.evaluation
        run = Run(model, self.tokenizer, self.recipe)
        answerer = run.answerer()
        alone = AnswerReader(self.tokenizer, answerer.templates, run.separator)
        chosen = self.examples[: options.sample_rows]
        samples: list[Sample] = []
        for start in range(0, len(chosen), options.batch_size):
            batch = chosen[start : start + options.batch_size]
            golden = with_writable_answers(batch, self.tokenizer, self.task, answerer.templates)
            texts = _read_out(answerer, [example.question for example in batch])
            for example, gold, readouts in zip(batch, golden, texts, strict=True):
                final = list(readouts.values())[-1]
                is_right = self.task.about(example.question).is_correct(alone(final, gold.answer), gold.answer)
                samples.append(Sample(_as_text(example.question), readouts, example.answer, is_right))
        return samples


def _read_out(answerer: Answerer, questions: Sequence[Question]) -> list[dict[str, str]]:
    """Return what each block reads out, or the answer alone without blocks or on a base that only generates."""
    if isinstance(answerer, BlockAnswerer) and answerer.num_blocks and can_decode(answerer.model):
        blocks = spread(range(1, answerer.num_blocks + 1), _MOST_BLOCKS)
        return [{f"block {k}": row[k - 1].text for k in blocks} for row in answerer.read_blocks(questions)]
    return [{"answered": text} for text in answerer.answer(questions, batch_size=len(questions))]


def _as_text(question: Question) -> str:
    if isinstance(question, str):
        return question
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)
