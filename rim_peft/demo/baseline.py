"""What RiM is compared with in the demo: LoRA of the same rank that answers at once, trained by TRL alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from rim_peft.data.tasks.potions import is_correct
from rim_peft.recipe import Recipe
from rim_peft.run.rows import load_rows


def train_answer_only(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, base: str, folder: Path) -> PeftModel:
    """Train LoRA on question → answer, on as many samples as both of the recipe's stages see.

    Args:
        recipe: the demo's recipe; rank, rows, batch, learning rate and number of samples are taken from it.
        tokenizer: the base's tokenizer.
        base: folder of the frozen base.
        folder: where the trainer writes.
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
        # What recipes/compare/demo.yaml finds for answering at once: stage 1's rate, but falling to zero.
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
    """Count the right answers that a model without blocks writes after prompts, greedily."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(is_correct, texts, gold))
