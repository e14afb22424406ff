"""Share a run's adapter: as an export, checked on the task's rows or a file's prompts, or as a commit on the Hub."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from rim_peft.data.examples import Question
from rim_peft.data.sources import hub_problem
from rim_peft.export.checking import LEAST_PROMPTS, CheckResult
from rim_peft.export.embedding_lora import export_embedding_lora
from rim_peft.export.folder import ExportOptions, Prompts, check_new
from rim_peft.export.merged import export_merged
from rim_peft.export.peft_lora import export_peft_lora
from rim_peft.methods import get_method
from rim_peft.recipe import EvaluationOptions
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run.loading import RECIPE_FILE, Run, describe_asking, load_run
from rim_peft.run.output_folder import ADAPTER_FILE, BASE_FOLDER, check_adapter, shared_files
from rim_peft.run.rows import first_questions
from rim_peft.tuner.card import CARD_FILE, CardText, Usage, describe_blocks, hub_id, name_base, read_card, render_card
from rim_peft.tuner.peft_plugin import NAME
from rim_peft.tuner.sharing import upload
from rim_peft.tuner.tensors import not_finite

FORMATS = {"merged": export_merged, "peft-lora": export_peft_lora, "embedding-lora": export_embedding_lora}
_CHECKED_ROWS = 64


def export(
    source: str,
    folder: Path,
    *,
    form: str = "merged",
    options: ExportOptions | None = None,
    questions: Iterable[Question] | None = None,
    max_new_tokens: int | None = None,
    task_name: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> CheckResult:
    """Write an adapter as a model that runs without this package, and check that it gives the same tokens.

    Args:
        source: output folder of a training, or an adapter's folder or Hub id.
        form: one of ``FORMATS``.
        questions: questions for the check; if not given, the first rows of the task's test (or validation) split.
        max_new_tokens: maximum length of a checked answer; the recipe's if not given.
        task_name: the task whose rows it is checked on, as in a recipe's ``data.task``; the training's if not given.
            A custom task class is imported only if it is named here.
        base: folder or Hub id of the base, if it is not where the adapter says.
        revision: branch, tag or commit of the adapter on the Hub.
        trust_remote_code: allow code that comes with the base or the tokenizer to run.

    Raises:
        ValueError: the format cannot express the adapter, ``folder`` is in use, or there are too few prompts.
        ExportCheckError: the export gives other answers; its files are kept.
    """
    options = options or ExportOptions()
    if form != "peft-lora":
        check_new(folder)  # before a base is loaded or anything is written
    if form != "embedding-lora" and options.spare_ids is not None:
        raise ValueError(
            f"spare_ids: must be omitted for the format {form}, which adds tokens, got {options.spare_ids}. Use "
            "--format embedding-lora, or omit --spare-ids."
        )
    run = load_run(source, base=base, revision=revision, trust_remote_code=trust_remote_code)
    if run.exported is not None:
        raise ValueError(f"{source}: is an export already. Give the adapter that it was made from.")
    if run.recipe is not None and not get_method(run.recipe.method).is_plain:
        raise ValueError(
            f"method: must be one that answers after tokens, got {run.recipe.method!r}: plain models have no "
            "continuous thoughts. Use it with this package (rim-peft generate)."
        )
    evaluation = run.recipe.evaluation if run.recipe is not None else EvaluationOptions()
    prompts = Prompts(
        questions=list(questions) if questions is not None else _task_questions(run, task_name),
        templates=run.templates,
        max_new_tokens=max_new_tokens or evaluation.max_new_tokens,
    )
    # Given before the check, since the files of an export that fails it are kept, to be evaluated.
    more: dict[str, Any] = {}
    if form == "merged" and run.recipe is not None:
        more["papers"] = {RECIPE_FILE: write_yaml(resolve(run.recipe))}
        more["noted"] = {"asked": describe_asking(run.recipe)}
    return FORMATS[form](run.model, run.tokenizer, folder, prompts, options, source=source, **more)


def _task_questions(run: Run, task_name: str | None) -> list[Question]:
    """Return the first questions of the task's test split or, if there is none, of validation.

    Raises:
        ValueError: the adapter does not say what it was trained on, or its rows cannot be found.
    """
    remedy = f"Give a file with {LEAST_PROMPTS} or more questions (--prompts)."
    if run.recipe is None and task_name is None:
        raise ValueError(f"prompts: must be given, since the adapter does not say what it was trained on. {remedy}")
    task = run.task(task_name)
    path = run.recipe.data.path if run.recipe is not None and task_name in (None, run.recipe.data.task) else None
    found = first_questions(task, path, limit=_CHECKED_ROWS)
    if found is None:
        raise ValueError(f"prompts: must be given, since the rows of the training are not in {path!r}. {remedy}")
    return found


logger = logging.getLogger(__name__)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
    base: str | None = None,
    licence: str | None = None,
) -> str:
    """Upload an adapter with everything that others need, but no checkpoints, and return the commit's URL.

    In the repository the card uses the adapter's id, and ``adapter_config.json`` names a base that others can load.
    The folder itself does not change.

    Args:
        folder: output folder of a run, or an adapter's folder.
        repo_id: ``owner/name``, or only a name for your own account; created if missing.
        revision: branch; created if missing.
        message: title of the commit.
        license: id of the adapter's licence on the Hub, such as ``apache-2.0``.
        base: Hub id of the base, if the adapter was trained on a copy in a folder.
        licence: the old name of ``license``.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: its files are damaged, it is of another kind, others could not load its base, or the Hub refuses
            the card.
        PermissionError: the Hub does not let you write there.
        ConnectionError: the Hub cannot be reached.
    """
    if licence is not None and license is not None:
        raise ValueError("licence: is the old name of license, which is given too. Omit it.")
    if licence is not None:
        warnings.warn("push: licence is now called license.", FutureWarning, stacklevel=2)
        license = licence
    folder = Path(folder)
    check_adapter(folder)
    if (found := not_finite(load_file(folder / SAFETENSORS_WEIGHTS_NAME))) is not None:
        raise ValueError(
            f"{folder}: its weights must be finite to be shared, {found}: its training had diverged. Train it again "
            "with a lower learning_rate."
        )
    files, card = _files_for_others(folder, base)
    if (problem := hub_problem()) is not None:
        raise ConnectionError(f"{repo_id}: cannot be uploaded: {problem}. Run it again when it can.")
    if license is None and read_card(card).data.get("license") is None:
        logger.warning("the card names no licence, so others do not know whether they may use it: --license adds one.")
    with writing_to_hub(repo_id):
        commit = upload(
            HfApi(),
            repo_id,
            files,
            commit_message=message or "Upload adapter",
            private=private,
            revision=revision,
            license=license,
        )
    return str(commit.commit_url)


def _files_for_others(folder: Path, base: str | None) -> tuple[dict[str, Path | bytes], str]:
    """Return an adapter's files by their path in a repository, with a base that others can load, and its card's text.

    Raises:
        ValueError: it is an adapter of another kind, or others could not load its base.
    """
    files: dict[str, Path | bytes] = dict(shared_files(folder))
    config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    if config["peft_type"] != NAME:
        raise ValueError(f"{folder}: must hold a {NAME} adapter, got one of type {config['peft_type']}.")
    own_base = (folder / BASE_FOLDER).is_dir()
    named = None if own_base else _public_base(folder, config.get("base_model_name_or_path"), base)
    if named != config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = named
        files[ADAPTER_FILE] = json.dumps(config, indent=2, sort_keys=True).encode()
    card = _card(folder, config, own_base=own_base)
    files[CARD_FILE] = (name_base(card, base) if base is not None and not own_base else card).encode()
    return files, card


@contextmanager
def writing_to_hub(repo_id: str) -> Iterator[None]:
    """Say what to do if the Hub does not let the user write to a repository.

    Raises:
        PermissionError: the Hub refuses the token.
    """
    try:
        yield
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"{repo_id}: the Hub must let you write there, but does not ({error.response.status_code}). Log in "
                "with a token that can write (hf auth login), or set HF_TOKEN."
            ) from error
        raise


def _public_base(folder: Path, named: str | None, base: str | None) -> str:
    """Return the name by which others find the base."""
    found = hub_id(base if base is not None else named)
    if found is None:
        raise ValueError(
            f"base: must be an id on the Hub, so that others can load it, got {(base or named)!r} in {folder}. Give "
            "the id of the original model (--base), or push your own base first."
        )
    return found


def _card(folder: Path, config: dict[str, Any], *, own_base: bool) -> str:
    path = folder / CARD_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    base = None if own_base else config["base_model_name_or_path"]
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    description = describe_blocks(config["num_blocks"], config["block_size"])
    usage = Usage(base, config.get("revision"), has_tokenizer=has_tokenizer)
    return render_card(folder.resolve().name, CardText(description, usage))
