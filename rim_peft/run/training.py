"""Train a recipe's adapter into its own folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from rim_peft.escaping import json_text
from rim_peft.evaluation import AccuracyReport
from rim_peft.recipe import Recipe, RecipeError
from rim_peft.recipe.reading import differing_keys, resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run.base import load_base, pin_base, to_device
from rim_peft.run.built_base import build_base
from rim_peft.run.loading import Run, describe_asking, load_run
from rim_peft.run.output_folder import (
    ADAPTER_FILE,
    BASE_FOLDER,
    PROBE,
    RECIPE_FILE,
    check_folder,
    holds_run,
    kept_base,
    listed_files,
    read_started,
    shared_files,
    write_files,
)
from rim_peft.run.record import describe_hardware, describe_versions, render_run_card
from rim_peft.run.rows import RunRows, fingerprint, load_rows
from rim_peft.run.tokenizer import load_tokenizer
from rim_peft.run.validation import Validation
from rim_peft.run_folders import FAILURE_FILE
from rim_peft.training.curriculum import CurriculumResult, Interrupted, run_stages
from rim_peft.training.distributed import gather_adapter, is_main, main_first, num_processes, on_main, run_whole
from rim_peft.training.files import explain_write_errors, find_damage, hold, write_text
from rim_peft.tuner.card import CARD_FILE
from rim_peft.tuner.files import RECORD_FILE, file_digests
from rim_peft.tuner.sharing import attach_papers
from rim_peft.values import cut, some_of

logger = logging.getLogger(__name__)

_STAGE_FIGURES = ("step", "epoch", "train_loss", "train_runtime", "eval_loss", "eval_accuracy")


def train(recipe: Recipe, *, command: Sequence[str] = ()) -> Run:
    """Train a recipe and write everything to its ``output_dir``.

    The folder holds the adapter, the tokenizer, ``recipe.yaml`` as run, ``run.json`` (metrics, versions, data,
    hardware), a model card, each stage's checkpoints, and the base if it was built from a configuration.

    Args:
        command: the command line, for the record.

    Raises:
        RecipeError: the folder holds another run, or this one and ``resume`` is not set.
        InUseError: another process trains into the folder.
        WriteError: the disk is full, or the folder cannot be written.
        Interrupted: a signal stopped the training; it can be resumed.
    """
    folder = Path(recipe.output_dir)
    started = time.time()
    recipe = pin_base(recipe, kept=on_main(lambda: kept_base(folder)) if recipe.resume else None)
    on_main(lambda: check_folder(folder, recipe))  # refuse before any work, and without leaving a folder
    stages = recipe.stage_trainers()
    task = recipe.task()
    rows = main_first(lambda: load_rows(recipe.data, task))
    with hold(folder), explain_write_errors(folder), _noting_failure(folder):
        return _train(recipe, rows, stages, started=started, command=command)


def _train(recipe: Recipe, rows: RunRows, stages: Sequence[Any], *, started: float, command: Sequence[str]) -> Run:
    folder, task = Path(recipe.output_dir), recipe.task()
    resumed = on_main(lambda: check_folder(folder, recipe))  # again: now nobody else writes to it
    on_main(lambda: _start(folder, recipe, rows))
    model, tokenizer = _attach(folder, recipe)
    validate = Validation.make(recipe, rows, task, tokenizer)
    result = run_stages(
        model,
        tokenizer,
        stages,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        output_dir=folder,
        validate=validate,
        read_samples=None if validate is None or not recipe.evaluation.sample_rows else validate.read_samples,
        resume=resumed,
    )
    model.eval()
    config = recipe.rim_config()
    report = run_whole(model, partial(validate.report, progress=is_main())) if validate is not None else None
    record: dict[str, Any] = {
        "command": list(command),
        "method": recipe.method,
        "seed": recipe.seed,
        "resumed": resumed,
        "started": _utc(started),
        "wall_seconds": round(time.time() - started, 1),
        "metrics": _metrics(result, report),
        "training": _describe_training(result),
        "parameters": dict(zip(("trainable", "all"), model.get_nb_trainable_parameters(), strict=True)),
        "base": recipe.model.name_or_path,
        "blocks": {"num_blocks": config.num_blocks, "block_size": config.block_size},
        "asked": describe_asking(recipe),
        "data": _describe_data(recipe, rows),
        "versions": describe_versions(),
        "hardware": {**describe_hardware(), "processes": num_processes(), **_peak_memory()},
    }
    adapter = gather_adapter(model)
    on_main(lambda: _write_end(folder, model, tokenizer, record, adapter))
    if adapter is None:  # a sharded model cannot be saved again as it is
        attach_papers(model, shared_files(folder, papers_only=True))
    return Run(model, tokenizer, recipe, record)


@contextmanager
def _noting_failure(folder: Path) -> Iterator[None]:
    """Write down the error that ends a training, for ``rim-peft runs``; the next start removes it."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        noted = {"kind": type(error).__name__, "message": cut(str(error)), "time": _utc(time.time())}
        if is_main() and folder.is_dir():
            with suppress(OSError):  # such as a full disk: what ended the training matters more
                write_text(folder / FAILURE_FILE, json_text(noted) + "\n")
        raise


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def train_or_load(recipe: Recipe, *, command: Sequence[str] = ()) -> Run:
    """Train a recipe into its folder: start it, resume it if it was stopped, or load it if it is finished.

    Args:
        recipe: what to train; its ``resume`` is ignored.
        command: the command line, for the record.

    Raises:
        RecipeError: the folder holds a run with other values, or something else.
        Interrupted: a signal stopped the training; repeat the call to resume it.
    """
    folder = Path(recipe.output_dir)
    recipe = pin_base(recipe, kept=on_main(lambda: kept_base(folder)))
    started = folder / RECIPE_FILE
    if not (folder / ADAPTER_FILE).exists():
        return train(replace(recipe, resume=started.exists()), command=command)
    kept = read_started(started) if started.exists() else {}
    if differing := differing_keys(kept, resolve(recipe)):
        raise RecipeError(
            f"output_dir: {folder} holds a finished run with other values of {some_of(differing, 8)} "
            f"({started} has them). Give another folder."
        )
    trusted = recipe.model.trust_remote_code
    run = load_run(folder, base=recipe.model.name_or_path, trust_remote_code=trusted)
    return replace(run, recipe=replace(recipe, resume=False))  # the caller's own, with the folder's values


def _start(folder: Path, recipe: Recipe, rows: RunRows) -> None:
    """Write the recipe and, if the base is built from scratch, the base."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    for left in folder.glob(f"{PROBE}*"):
        left.rmdir()
    if not holds_run(folder):  # remove the base of a run that failed before it began
        shutil.rmtree(folder / BASE_FOLDER, ignore_errors=True)
    write_text(folder / RECIPE_FILE, write_yaml(resolve(recipe)))
    options, base_folder = recipe.model, folder / BASE_FOLDER
    if base_folder.exists() and (damage := find_damage(base_folder, ["config.json"])) is not None:
        logger.warning("%s: %s. The base is built again, with the same weights.", base_folder, damage)
        shutil.rmtree(base_folder)
    if options.name_or_path is None and not base_folder.exists():
        templates = recipe.data.templates
        build_base(options.config or {}, rows.train, templates=templates, seed=recipe.seed, folder=base_folder)


def _attach(folder: Path, recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return the base with a new adapter, and its tokenizer."""
    options = recipe.model
    source = options.name_or_path
    if source is None:
        source = str(folder / BASE_FOLDER)
    elif Path(source).is_dir():
        source = str(Path(source).resolve())  # absolute: the adapter names its base and is used from other folders
    try:
        tokenizer = load_tokenizer(options.tokenizer or source, options)
        base = load_base(source, options)
    except OSError as error:
        if Path(source).is_dir():
            raise
        raise OSError(
            f"model.name_or_path: {source!r} is not a folder in {Path.cwd()} and cannot be loaded from the Hub: {error}"
        ) from error
    set_seed(recipe.seed)
    return to_device(get_peft_model(base, recipe.rim_config()), options), tokenizer


def _metrics(result: CurriculumResult, report: AccuracyReport | None) -> dict[str, Any]:
    """Return the validation report, the origin of the best weights, and each stage's last figures."""
    stages = {}
    for stage, lines in result.history.items():
        latest = {name: value for line in lines for name, value in line.items()}
        stages[stage] = {name: latest[name] for name in _STAGE_FIGURES if name in latest}
    return {"validation": report.to_dict() if report is not None else None, "best": result.best, "stages": stages}


def _describe_training(result: CurriculumResult) -> dict[str, Any]:
    """Return the stages' total samples (None for a stream), tokens of their rows, and seconds."""
    stages = [{name: value for line in lines for name, value in line.items()} for lines in result.history.values()]
    is_counted = all("num_samples" in stage for stage in stages)
    return {
        "num_samples": sum(int(stage["num_samples"]) for stage in stages) if is_counted else None,
        "num_tokens": sum(int(stage["num_tokens"]) for stage in stages),
        "seconds": round(sum(stage["train_seconds"] for stage in stages), 1),
    }


def _peak_memory() -> dict[str, float]:
    """Return the peak of what this process's tensors took on its GPU; nothing without one."""
    return {"peak_gpu_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1)} if torch.cuda.is_available() else {}


def _describe_data(recipe: Recipe, rows: RunRows) -> dict[str, Any]:
    data = recipe.data
    # A stream is read during training; reading it again for a fingerprint could take as long as the training.
    train = {"streamed": True} if data.streaming else fingerprint(rows.train)
    validation = fingerprint(rows.validation) if rows.validation is not None else None
    return {
        "task": data.task,
        "path": data.path,
        "prompt_template": data.prompt_template,
        "train": train,
        "validation": validation,
    }


def _write_end(
    folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    adapter: dict[str, Tensor] | None,
) -> None:
    """Write the adapter and its documents; ``adapter`` holds its tensors if the model is sharded."""

    recipe_text = (folder / RECIPE_FILE).read_text(encoding="utf-8")

    def save(partial: Path) -> None:
        tokenizer.save_pretrained(partial)
        # The vocabulary never changes, so keep PEFT from asking the Hub whether it did.
        model.save_pretrained(str(partial), save_embedding_layers=False, state_dict=adapter)
        record["files"] = {
            **file_digests(folder, [name for name in listed_files(folder) if name.startswith(f"{BASE_FOLDER}/")]),
            **file_digests(partial, listed_files(partial)),
        }
        (partial / RECORD_FILE).write_text(json_text(record, indent=2) + "\n", encoding="utf-8")
        card = render_run_card(folder.resolve().name, record, recipe_text)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")

    write_files(folder, save, last=ADAPTER_FILE)
