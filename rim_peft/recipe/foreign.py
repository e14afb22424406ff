"""What other tools call the keys of a recipe, to name the right one where somebody brings theirs along."""

from __future__ import annotations

from rim_peft.methods import STAGES

_STAGE = "STAGE"
"""Stands for the stage that a key was given in, the first one elsewhere."""

_NAMES: dict[str, tuple[str, ...]] = {
    # Names in TRL, axolotl, LLaMA-Factory, Unsloth, torchtune, open-instruct and older versions of transformers.
    "model.name_or_path": (
        *("base_model", "base_model_name", "model_name", "model_id", "model_path", "pretrained", "checkpoint"),
        *("model_name_or_path", "base_model_name_or_path", "pretrained_model_name_or_path", "hf_model"),
    ),
    "model.revision": ("model_revision", "revision_of_model", "base_model_revision"),
    "model.tokenizer": ("tokenizer_name", "tokenizer_path", "tokenizer_name_or_path", "tokenizer_config"),
    "model.dtype": ("torch_dtype", "model_dtype", "compute_dtype", "precision", "torchdtype"),
    "model.quantization: nf4": ("load_in_4bit", "use_4bit", "qlora", "quantization_bit", "bnb_4bit_quant_type"),
    "model.quantization: int8": ("load_in_8bit", "use_8bit"),
    "model.quantization": ("quantization_config", "quantization_method", "quantize", "bnb_config"),
    "model.attn_implementation": (
        *("attention_implementation", "attn_impl", "flash_attn", "flash_attention", "use_flash_attention"),
        *("use_flash_attention_2", "sdp_attention", "sdpa_attention", "eager_attention", "flex_attention", "attention"),
    ),
    "data.path": (
        *("dataset", "datasets", "dataset_name", "dataset_path", "dataset_dir", "data_path", "data_file"),
        *("data_files", "train_file", "train_data", "train_dataset", "dataset_id", "dataset_name_or_path"),
    ),
    "data.train_split": ("dataset_train_split", "split"),
    "data.validation_split": ("dataset_test_split", "eval_split", "eval_dataset", "val_split", "dev_split"),
    "data.validation_rows": ("val_set_size", "val_size", "eval_size", "max_eval_samples", "validation_size"),
    "data.train_rows": ("max_samples", "max_train_samples", "num_samples", "num_train_samples"),
    "data.max_length": (
        *("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "seq_length", "seq_len", "model_max_length"),
        *("max_sequence_length", "sequence_length", "context_length", "block_length", "max_source_length"),
    ),
    "data.prompt_template": ("template", "prompt_format", "prompt_style", "prompt", "instruction_template"),
    "data.streaming": ("stream", "iterable_dataset"),
    "adapter.r": ("lora_r", "lora_rank", "rank", "lora_dim", "peft_lora_r"),
    "adapter.lora_alpha": ("alpha", "peft_lora_alpha"),
    "adapter.lora_dropout": ("peft_lora_dropout", "lora_drop"),
    "adapter.target_modules": (
        *("lora_target_modules", "lora_target", "lora_modules", "lora_attn_modules", "lora_target_linear"),
        *("target_layers", "lora_layers"),
    ),
    "adapter.use_dora": ("peft_use_dora", "dora", "lora_use_dora"),
    "adapter.use_rslora": ("rslora", "lora_use_rslora", "use_rs_lora"),
    "adapter.num_blocks": ("blocks", "memory_blocks", "num_memory_blocks", "num_thoughts"),
    "adapter.block_size": ("memory_tokens", "tokens_per_block", "memory_size"),
    f"{_STAGE}.per_device_train_batch_size": (
        *("micro_batch_size", "batch_size", "train_batch_size", "per_gpu_train_batch_size", "mini_batch_size"),
        *("train_micro_batch_size_per_gpu", "per_device_batch_size", "global_batch_size"),
    ),
    f"{_STAGE}.per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    f"{_STAGE}.gradient_accumulation_steps": ("grad_accum", "gradient_accumulation", "accumulate_grad_batches"),
    f"{_STAGE}.num_train_epochs": ("num_epochs", "epochs", "epoch", "max_epochs", "n_epochs"),
    f"{_STAGE}.max_steps": ("steps", "num_steps", "num_train_steps", "train_steps", "max_steps_per_epoch", "max_iters"),
    f"{_STAGE}.learning_rate": ("lr", "peak_lr", "max_lr"),
    f"{_STAGE}.lr_scheduler_type": ("lr_scheduler", "scheduler", "lr_schedule", "scheduler_type", "lr_decay_style"),
    f"{_STAGE}.warmup_steps": ("warmup", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps", "warmup_iters"),
    f"{_STAGE}.optim": ("optimizer", "optimizer_type", "optimiser", "optimizer_name"),
    f"{_STAGE}.max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad", "max_norm", "clip_grad_norm"),
    f"{_STAGE}.weight_decay": ("wd", "decay"),
    f"{_STAGE}.gradient_checkpointing": ("enable_activation_checkpointing", "use_gradient_checkpointing"),
    f"{_STAGE}.bf16": ("mixed_precision", "use_bf16", "bfloat16"),
    f"{_STAGE}.fp16": ("use_fp16", "half"),
    f"{_STAGE}.pack_length": ("sample_packing", "packing", "pack", "multipack", "sequence_packing"),
    f"{_STAGE}.max_tokens_per_batch": ("batch_max_len", "max_tokens", "token_batch_size"),
    f"{_STAGE}.compile_layers": ("torch_compile", "compile"),
    f"{_STAGE}.logging_steps": ("log_every_n_steps", "log_interval", "log_steps"),
    f"{_STAGE}.save_steps": ("saves_per_epoch", "checkpointing_steps", "save_interval"),
    f"{_STAGE}.eval_steps": ("evals_per_epoch", "eval_interval", "evaluation_steps", "val_interval"),
    f"{_STAGE}.report_to": ("wandb_project", "use_wandb", "use_tensorboard", "use_swanlab", "log_with"),
    f"{_STAGE}.eval_strategy": ("evaluation_strategy",),
    "evaluation.max_new_tokens": ("max_new_token", "max_output_tokens", "max_gen_toks", "generation_max_length"),
    "evaluation.batch_size": ("generation_batch_size", "inference_batch_size"),
    "output_dir": ("output", "output_path", "save_dir", "out_dir", "run_dir", "checkpoint_dir"),
    "seed": ("random_seed", "random_state", "data_seed"),
    "resume": ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
}
_KEYS = {name: key for key, names in _NAMES.items() for name in names}


def foreign_key(section: str, name: str) -> str | None:
    """Return our key for another tool's, as it is written in a section; None for a name of nobody's.

    >>> foreign_key("", "max_seq_length"), foreign_key("refinement", "lr"), foreign_key("", "lr")
    ('data.max_length', 'learning_rate', 'grounding.learning_rate')
    """
    key = _KEYS.get(name.lower().replace("-", "_"))
    if key is None:
        return None
    stage = section if section in STAGES else STAGES[0]
    key = key.replace(_STAGE, stage, 1)
    return key.removeprefix(f"{section}.") if section else key
