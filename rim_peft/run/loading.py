"""Load a finished run, an adapter or an export, without naming its base again, to ask it questions."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Templates
from rim_peft.data.sources import asking_hub
from rim_peft.export.reading import ExportAnswerer, is_export, load_export
from rim_peft.export.record import EXPORT_FILE, ExportRecord
from rim_peft.inference import Answerer, BlockAnswerer
from rim_peft.inference.greedy import BaseAnswerer
from rim_peft.methods import STAGES, get_method
from rim_peft.recipe import EvaluationOptions, ModelOptions, Recipe
from rim_peft.recipe.reading import load_found_recipe
from rim_peft.recipe.sections import FoundRecipe
from rim_peft.run.base import load_base, to_device
from rim_peft.run.named_bases import parse_name
from rim_peft.run.output_folder import ADAPTER_FILE, BASE_FOLDER, RECIPE_FILE, check_adapter, shared_files
from rim_peft.run.tokenizer import load_tokenizer, read_tokenizer
from rim_peft.tasks import Task, get_task
from rim_peft.tuner import RIM, RiMConfig
from rim_peft.tuner.files import RECORD_FILE, brief, check_digests, is_ours, read_object
from rim_peft.tuner.sharing import attach_papers
from rim_peft.tuner.tensors import AGAIN
from rim_peft.values import shown

logger = logging.getLogger(__name__)

_PAPER = "Put back a copy, or delete it: the adapter answers without it."


@dataclass(frozen=True)
class Run:
    """A trained adapter on its base, with everything needed to ask it questions.

    Attributes:
        model: the base with the adapter.
        tokenizer: the base's tokenizer.
        recipe: how it was trained; None for an adapter that was saved by hand.
        record: contents of ``run.json``; empty for an adapter that was saved by hand.
        exported: record of an export, whose ``model`` is a plain one; None for an adapter.
        is_untrained: whether the adapter changes nothing, so that it is the base that answers.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe | None = None
    record: dict[str, Any] = field(default_factory=dict)
    exported: ExportRecord | None = None
    is_untrained: bool = False

    @property
    def metrics(self) -> dict[str, Any]:
        """The training's numbers."""
        metrics: dict[str, Any] = self.record.get("metrics", {})
        return metrics

    @property
    def templates(self) -> Templates:
        """Templates of the training, or the defaults."""
        return self.recipe.data.templates if self.recipe is not None else Templates()

    @property
    def separator(self) -> str | None:
        """Text after each step of the method's answers; None if it writes no steps."""
        return separator_of(self.recipe) if self.recipe is not None else None

    def answerer(
        self, *, num_blocks: int | None = None, max_new_tokens: int | None = None, model: Any = None
    ) -> Answerer:
        """Return an answerer that asks questions as in training.

        Args:
            num_blocks: blocks after each prompt; the adapter's own if not given.
            max_new_tokens: maximum length of an answer, EOS included; the recipe's if not given.
            model: another model to ask in the same way.
        """
        evaluation = self.recipe.evaluation if self.recipe is not None else EvaluationOptions()
        settings: dict[str, Any] = {
            "templates": self.templates,
            "num_blocks": num_blocks,
            "max_new_tokens": max_new_tokens or evaluation.max_new_tokens,
        }
        model = self.model if model is None else model
        if self.exported is not None:
            return ExportAnswerer(model, self.tokenizer, record=self.exported, **settings)
        if self.is_untrained:
            return BaseAnswerer(
                model, self.tokenizer, templates=self.templates, max_new_tokens=settings["max_new_tokens"]
            )
        if self.recipe is None:
            return BlockAnswerer(model, self.tokenizer, **settings)
        method = get_method(self.recipe.method)
        return method.answerer(model, self.tokenizer, getattr(self.recipe, method.stages[-1]) or {}, **settings)

    def task(self, name: str | None = None) -> Task:
        """Return a task, with the training's options if it is the training's task.

        Args:
            name: as in a recipe's ``data.task``; the training's task if not given.

        Raises:
            ValueError: there is none, or only a folder's recipe names the class that would be imported.
        """
        recipe = self.recipe
        if recipe is None or name not in (None, recipe.data.task):
            if name is None:
                raise ValueError(
                    "task: must be given, since the adapter does not say what it was trained on. Name it (--task)."
                )
            return get_task(name)
        return recipe.task(named=name) if isinstance(recipe, FoundRecipe) else recipe.task()


def separator_of(recipe: Recipe) -> str | None:
    """Return the text after each step in answers of a recipe's method; None if it writes no steps."""
    return get_method(recipe.method).separator(recipe.data.step_separator)


def load_untrained(recipe: Recipe) -> Run:
    """Load a recipe's base with an adapter that changes nothing, to ask the untrained base in the method's way.

    Raises:
        ValueError: the method has blocks, or the base is not from a folder or the Hub.
        OSError: the base does not exist.
    """
    source = recipe.model.name_or_path
    config = recipe.rim_config()
    method = get_method(recipe.method)
    if source is None or method.has_blocks or not method.is_plain:
        raise ValueError(
            "method: an untrained base must be an existing model (model.name_or_path) and be asked without blocks, got "
            f"method {recipe.method!r} and base {source!r}. Use method answer or cot, and name a base."
        )
    config.init_lora_weights = True
    model = get_peft_model(load_base(source, recipe.model), config)
    tokenizer = load_tokenizer(recipe.model.tokenizer or source, recipe.model)
    return Run(to_device(model, recipe.model).eval(), tokenizer, recipe, is_untrained=True)


def load_run(
    source: str | Path, *, base: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Run:
    """Load an output folder, an adapter's folder or Hub id, or a merged export, for evaluation and generation.

    The base is the folder's own if it has one, so that the folder may be moved; otherwise the one that the adapter
    names. Nothing in the folder can make code run: its recipe is a :class:`~rim_peft.recipe.sections.FoundRecipe`.

    Args:
        source: folder or Hub id.
        base: folder or Hub id of the base, if it is not where the adapter says.
        revision: branch, tag or commit of the adapter on the Hub.
        trust_remote_code: allow code that comes with the base or the tokenizer to run.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        RecipeError: its recipe cannot be read, or needs to run code of the base without ``trust_remote_code``.
        ValueError: the adapter is of another kind, of a later version, or made for another base; or its files are
            damaged.
        OSError: adapter or base cannot be found; the message says which.
        ConnectionError: the download was interrupted and could not be resumed.
    """
    is_local = Path(source).exists()
    if is_local and revision is not None:
        raise ValueError(
            f"revision: must be omitted for a folder, got {revision!r}: it belongs to an id on the Hub, but {source} "
            "is a folder here."
        )
    folder = Path(source) if is_local else _download(str(source), revision)
    if is_export(folder):
        if base is not None:
            raise ValueError(
                f"base: must be omitted for an export, which holds all its weights, got {base!r} (--base)."
            )
        recipe = _recipe_of(folder, trust_remote_code)
        plain, tokenizer, exported = load_export(folder, trust_remote_code=trust_remote_code)
        _check_recipe(folder / EXPORT_FILE, read_object(folder / EXPORT_FILE), recipe)
        return Run(plain, tokenizer, recipe, exported=exported)
    config = _read_config(folder)
    papers = shared_files(folder, papers_only=True)
    recipe = _recipe_of(folder, trust_remote_code)
    record = _read_record(folder, recipe)
    found, options = _choose_base(folder, config, recipe, base=base, trust_remote_code=trust_remote_code)
    model = _load_base_of(source, found, options)
    tokenizer = read_tokenizer(folder, options, otherwise=options.tokenizer or found)
    adapted = to_device(PeftModel.from_pretrained(model, str(folder)), options)
    attach_papers(adapted, papers)
    return Run(adapted.eval(), tokenizer, recipe, record)


def _choose_base(
    folder: Path, config: RiMConfig, recipe: FoundRecipe | None, *, base: str | None, trust_remote_code: bool
) -> tuple[str, ModelOptions]:
    """Return the folder, id or short name of an adapter's base, and the options to load it with."""
    pinned = None if recipe is None else recipe.model.name_or_path
    if base is not None and pinned is not None and parse_name(base) is not None and pinned.startswith(f"{base}@"):
        base = pinned  # the weights that it was trained on, whichever this machine has
    found = base or (pinned if pinned and parse_name(pinned) else _base_source(folder, config))
    options = ModelOptions(name_or_path=found, trust_remote_code=trust_remote_code)
    if recipe is not None:
        options = recipe.model
        if base is None and options.gguf_file is not None:
            options = replace(options, name_or_path=found)  # the GGUF file is needed wherever the folder is now
    return found, options


def _load_base_of(source: str | Path, base: str, options: ModelOptions) -> Any:
    """Load an adapter's base; its errors say whose base it is, and what to do."""
    try:
        return load_base(base, options)
    except OSError as error:
        raise OSError(
            f"the base {base!r} of {source} cannot be loaded: {str(error).rstrip('.')}. Name the base if it was moved."
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # from its configuration
        if is_ours(error):
            raise
        raise ValueError(
            f"{base}: must be a model that transformers can load, but is not ({brief(error)}). "
            "Copy or download the base again, or name another one (--base)."
        ) from error


def describe_asking(recipe: Recipe) -> dict[str, Any]:
    """Return the settings, besides the adapter's own files, that a recipe's answers depend on, for the record."""
    return {
        "method": recipe.method,
        **{f"templates.{name}": text for name, text in asdict(recipe.data.templates).items()},
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "dtype": recipe.model.dtype,
        "quantization": recipe.model.quantization,
    }


def _read_record(folder: Path, recipe: Recipe | None) -> dict[str, Any]:
    """Read ``run.json``, and check that the folder's files are the ones it lists.

    Raises:
        ValueError: it is damaged, or a file is missing, damaged or from another run.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return {}
    record = read_object(path, remedy=_PAPER)
    if not isinstance(record.get("metrics", {}), dict):
        raise ValueError(f"{path}: metrics: must be an object, got {shown(record['metrics'])}. {AGAIN}")
    check_digests(path, record.get("files"))
    _check_recipe(path, record, recipe)
    return record


def _check_recipe(path: Path, record: dict[str, Any], recipe: Recipe | None) -> None:
    """Check that a folder's recipe agrees with its record in everything that answers depend on."""
    asked = record.get("asked", {} if path.name == RECORD_FILE else None)
    if asked is None:  # an export of an adapter without a recipe
        return
    if not isinstance(asked, dict):
        raise ValueError(f"{path}: asked: must be an object, got {shown(asked)}. {AGAIN}")
    other = path.parent / RECIPE_FILE
    if recipe is None:
        raise ValueError(f"{other}: must be there, since prompts depend on it, but is missing. {AGAIN}")
    for name, value in describe_asking(recipe).items():
        if (noted := asked.get(name, value)) != value:
            raise ValueError(
                f"{other}: {name}: must be {shown(noted)}, as {path.name} says, got {shown(value)}: it is from another "
                f"run or was changed. {AGAIN} If you changed it on purpose, change asked in {path.name} too."
            )


def _recipe_of(folder: Path, trust_remote_code: bool) -> FoundRecipe | None:
    path = folder / RECIPE_FILE
    if not path.exists():
        logger.warning(
            "%s has no %s, which says how prompts were written in training: questions are asked with the default "
            "templates, %r. If the training had others, ask in Python, with templates=... of rim_peft.inference.",
            folder,
            RECIPE_FILE,
            Templates.prompt,
        )
        return None
    return load_found_recipe(path, trust_remote_code=trust_remote_code)


def _download(name: str, revision: str | None) -> Path:
    """Fetch an adapter from the Hub, without a run's checkpoints and without pickles."""
    ignored = [*(f"{stage}/*" for stage in STAGES), "checkpoint-*/*", "best.safetensors", "*.bin", "*.pt", "*.pth"]
    at = f" at revision {revision!r}" if revision is not None else ""
    try:
        with asking_hub(name):
            return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name}: is not a folder, and cannot be read from the Hub{at}: {error}") from error
    except Exception as error:  # network errors, whose classes differ between versions of huggingface_hub
        raise ConnectionError(
            f"{name}: could not be downloaded from the Hub{at}: {error}. Run it again: complete files are kept."
        ) from error


def _read_config(folder: Path) -> RiMConfig:
    check_adapter(folder)
    kind = read_object(folder / ADAPTER_FILE)["peft_type"]
    if kind != RIM.value:
        raise ValueError(
            f"{folder}: must hold a RIM adapter, got one of type {shown(kind)} ({ADAPTER_FILE}). Use PEFT for it."
        )
    return RiMConfig.from_pretrained(str(folder))


def _base_source(folder: Path, config: RiMConfig) -> str:
    if (folder / BASE_FOLDER).is_dir():
        return str(folder / BASE_FOLDER)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{folder / ADAPTER_FILE}: base_model_name_or_path: must name the base, but does not. Name it (--base)."
        )
    return config.base_model_name_or_path
