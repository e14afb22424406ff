"""Rehearse a stage on a tiny model: one step with the recipe's options, so that what they make fail fails now."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from rim_peft.recipe import Recipe
from rim_peft.recipe.problems import find_culprit
from rim_peft.recipe.sections import HARDWARE
from rim_peft.run.at_hand import NotAtHandError
from rim_peft.run.built_base import train_tokenizer
from rim_peft.tuner import RiMConfig

_SHORT: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 1,
    "max_length": None,
    "logging_steps": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "eval_delay": 0,
    "compile_layers": False,  # takes minutes
    "full_determinism": False,  # would affect the whole process
    "optim_target_modules": None,  # names layers of the base
    "push_to_hub": False,
}
"""Options that a rehearsal overrides, since they change how long it takes or what it leaves behind."""

_TOKENIZER_OPTIONS = ("eos_token", "pad_token")


def rehearse(recipe: Recipe, stage: str, tokenizer: PreTrainedTokenizerBase | None, *, num_steps: int | None) -> None:
    """Build a stage's trainer with the recipe's options, and train, evaluate and save one step on the CPU.

    This finds invalid trackers, optimisers, schedules, special tokens, strategies and launcher settings now, not after
    the base has been loaded or, in a later stage, after the first stage has been trained.

    Args:
        tokenizer: the base's; None to use a substitute.
        num_steps: the stage's number of steps; None if unknown.

    Raises:
        ValueError: the training would fail; the message begins with the key if a single key is to blame.
        NotAtHandError: the rehearsal itself does not work here.
    """
    given: Mapping[str, Any] = {key: value for key, value in getattr(recipe, stage).items() if key not in HARDWARE}
    if tokenizer is None:
        tokenizer = train_tokenizer([], recipe.data.templates, vocab_size=300)
        given = {key: value for key, value in given.items() if key not in _TOKENIZER_OPTIONS}

    def play(**values: Any) -> None:
        options: dict[str, Any] = {stage: values}
        _play(replace(recipe, **options), stage, tokenizer, num_steps=num_steps or 100)

    try:
        play(**given)
    except Exception as error:
        message = str(error)
        if _fails(play):
            raise NotAtHandError(f"it cannot be rehearsed on a tiny model ({message}). Run a step.") from error
        named_first = dict(sorted(given.items(), key=lambda option: option[0] not in message))
        key = find_culprit(play, named_first, message)
        text = " ".join(message.split())
        raise ValueError(f"{key}: {text.removeprefix(f'{key}: ')}" if key else text) from error


def _fails(play: Callable[[], None]) -> bool:
    """Tell whether a rehearsal fails even without the recipe's options, so that the recipe is not to blame."""
    try:
        play()
    except Exception:
        return True
    return False


def _play(recipe: Recipe, stage: str, tokenizer: PreTrainedTokenizerBase, *, num_steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        # An epoch of a few rows has almost no steps, so set the number of steps: the schedule depends on it.
        changes = {**_SHORT, "output_dir": folder, "max_steps": num_steps}
        if not recipe.data.streaming:
            changes["max_tokens_per_batch"] = None
            # These rows all have the same length.
            changes |= dict.fromkeys(("length_shares", "length_accuracy", "layer_shares"))
        trainer_class, args = recipe.stage_trainer(stage, anywhere=True, **changes)
        rim = recipe.rim_config()
        adapter = RiMConfig(r=2, num_blocks=rim.num_blocks, block_size=rim.block_size)
        model = get_peft_model(_stand_in(tokenizer), adapter)
        row = {"prompt_ids": [0, 0], "step_ids": [[0]] * max(1, rim.num_blocks), "answer_ids": [0]}
        rows: Any = Dataset.from_list([row] * 2)
        has_validation = recipe.data.validation_rows > 0
        trainer = trainer_class(
            model,
            args,
            train_dataset=rows.to_iterable_dataset().repeat(None) if recipe.data.streaming else rows,
            eval_dataset=rows if has_validation and args.eval_strategy != "no" else None,
            processing_class=tokenizer,
            validate=(lambda _: {"accuracy": 0.0}) if has_validation else None,
            callbacks=[_OneStep()],
        )
        for callback in list(trainer.callback_handler.callbacks):
            # Trackers would start a run.
            if isinstance(callback, PrinterCallback) or type(callback).__module__.startswith("transformers.integr"):
                trainer.remove_callback(callback)
        trainer.train()


def _stand_in(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return a tiny model with room for the tokenizer's ids."""
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), *(id for id in (tokenizer.eos_token_id, tokenizer.pad_token_id) if id), 8) + 1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class _OneStep(TrainerCallback):
    """Ends the training after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True
