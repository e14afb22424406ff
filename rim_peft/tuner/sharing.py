"""Loading, saving and pushing a RIM adapter, where this differs from PEFT."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.functional import delete_adapter
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.hub import cached_file

from rim_peft.tuner.card import CARD_FILE, CardText, Usage, complete_card, describe_blocks, name_adapter, render_card
from rim_peft.tuner.config import RiMConfig, active_config
from rim_peft.tuner.files import check_replacement, check_weights, explain, note_options, renew_digest
from rim_peft.tuner.model import FILE, detach, has_memory
from rim_peft.tuner.tensors import damaged_file, not_finite, read_tensors, seal_tensors

_ADAPTER = "default"
"""Name of the adapter that papers belong to: PEFT saves it in the folder itself, others in subfolders."""

_LOADING = "rim_loading"
"""The base's attribute while ``PeftModel.from_pretrained`` loads its first adapter, whose options it has read."""

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of a call that locate the Hub's files."""


@dataclass(frozen=True)
class Papers:
    """Files that accompany an adapter's weights: its card, recipe, training record and tokenizer.

    Attributes:
        files: paths of the files, by their relative path in an adapter's folder.
        digest: SHA-256 of the weights.
    """

    files: Mapping[str, Path]
    digest: str


def attach_papers(model: PeftModel, files: Mapping[str, Path]) -> None:
    """Attach files that are saved and pushed together with an adapter, as long as its weights do not change.

    Args:
        model: a model whose adapter has PEFT's default name.
        files: paths of the files, by their relative path in an adapter's folder; ``README.md`` is the card.
    """
    vars(model.base_model)["papers"] = Papers(dict(files), _digest(model))


def load_pretrained(original: Callable[..., Any], model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter with ``PeftModel.from_pretrained``; if it is refused, the base stays as it was.

    Raises:
        ValueError: the adapter's files are damaged, or it does not fit the base.
    """
    had_memory = has_memory(model)
    vars(model)[_LOADING] = True
    try:
        return original(model, model_id, *args, **kwargs)
    except Exception as error:
        if had_memory or not has_memory(model):
            raise
        detach(model)
        _reraise(str(model_id), error)
    finally:
        vars(model).pop(_LOADING, None)


def load_adapter(
    model: PeftModel, original: Callable[..., Any], model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Load an adapter, with clear errors about missing or damaged files.

    If loading fails, the adapter is removed, so that nobody uses its random start.

    Raises:
        FileNotFoundError: the folder lacks the adapter's weights.
        ValueError: the weights are damaged or cut off, the file contains tensors of something else, or the name is
            that of an attached adapter with other options.
    """
    folder = Path(model_id, kwargs.get("subfolder") or "")
    if (folder / CONFIG_NAME).is_file():  # else PEFT asks the Hub
        check_weights(folder)
    known = set(model.peft_config)
    if adapter_name in known and _LOADING not in vars(model.get_base_model()) and not _lacks_config(folder):
        options = {name: kwargs[name] for name in _DOWNLOAD if kwargs.get(name) is not None}
        config, attached = PeftConfig.from_pretrained(model_id, **options), model.peft_config[adapter_name]
        if isinstance(config, RiMConfig) and isinstance(attached, RiMConfig):
            check_replacement(str(model_id), attached, config, adapter_name=adapter_name)
    try:
        return original(model, model_id, adapter_name, *args, **kwargs)
    except Exception as error:
        for name in set(model.peft_config) - known:
            model.delete_adapter(name)
        _reraise(str(model_id), error)


def _lacks_config(folder: Path) -> bool:
    """Tell whether a folder holds an adapter's weights without its options, which PEFT replaces an adapter's by."""
    return folder.is_dir() and not (folder / CONFIG_NAME).is_file()


def load_natively(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter with transformers' own ``load_adapter``, which accepts any tensor of a file.

    The file is read and checked when the adapter's layers exist, before any tensor is loaded.

    Raises:
        ValueError: as for :func:`load_adapter`.
    """
    known = set(getattr(model, "peft_config", {}))
    had_memory = has_memory(model)
    call = inspect.signature(original).bind(model, *args, **kwargs)
    vars(model)[FILE] = functools.partial(_read_native, call.arguments)
    try:
        return original(model, *args, **kwargs)
    except Exception as error:
        if had_memory:
            for name in set(model.peft_config) - known:
                # What the model's own delete_adapter does, which may need a newer PEFT than loading does.
                prefix = f"{model.peft_config.pop(name).peft_type.value.lower()}_"
                delete_adapter(model, adapter_name=name, prefix=prefix)
        elif has_memory(model):
            detach(model)
            model._hf_peft_config_loaded = False
        else:
            raise
        _reraise(str(call.arguments.get("peft_model_id")), error)
    finally:
        vars(model).pop(FILE, None)


def _read_native(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that a call of transformers' ``load_adapter`` will load."""
    if (given := arguments.get("adapter_state_dict")) is not None:
        return dict(given)
    more: Mapping[str, Any] = arguments.get("kwargs", {})
    config = arguments.get("load_config")
    if (config.use_safetensors if config is not None else more.get("use_safetensors")) is False:
        raise ValueError("use_safetensors: must not be False, since a pickle can run code and is not read. Omit it.")
    source: Any = arguments.get("peft_model_id") or (
        config.pretrained_model_name_or_path if config is not None else None
    )
    if (Path(source) / CONFIG_NAME).is_file():
        check_weights(Path(source))
    options = {**(config.download_kwargs if config is not None else more.get("download_kwargs") or {})}
    options.update(arguments.get("adapter_kwargs") or {})
    options.update({name: more[name] for name in _DOWNLOAD if name in more})
    found = cached_file(
        source, SAFETENSORS_WEIGHTS_NAME, **{name: options[name] for name in _DOWNLOAD if options.get(name) is not None}
    )
    return read_tensors(Path(str(found)))


def _reraise(source: str, error: Exception) -> NoReturn:
    """Raise a loading error again as one that names the files."""
    if isinstance(error, SafetensorError):  # from a file in the Hub's cache
        raise damaged_file(source, error) from error
    explained = explain(source, error)
    if explained is error:
        raise error
    raise explained from error


def save_pretrained(model: PeftModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Save adapters, with the files of their run unless they were trained further.

    Raises:
        ValueError: the weights would be written as a pickle, or are not finite.
    """
    call = inspect.signature(original).bind(model, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    if not options["safe_serialization"]:
        raise ValueError(
            "safe_serialization: must be True, got False: adapters are saved as safetensors, since a pickle can run "
            "code and is not read again. Omit it."
        )
    selected = options["selected_adapters"]
    if options["is_main_process"]:
        for name in selected or model.peft_config:
            tensors = get_peft_model_state_dict(
                model, state_dict=options["kwargs"].get("state_dict"), adapter_name=name, save_embedding_layers=False
            )
            if (found := not_finite(tensors)) is not None:
                raise ValueError(
                    f"adapter {name!r}: its weights must be finite to be saved, {found}: its training had diverged. "
                    "Train it again with a lower learning_rate."
                )
    if options["is_main_process"] and (selected is None or _ADAPTER in selected):
        _copy_papers(model, Path(options["save_directory"]))
    original(model, *args, **kwargs)
    if options["is_main_process"]:
        for name in model.peft_config if selected is None else selected:
            folder = Path(options["save_directory"], "" if name == _ADAPTER else name)
            weights = folder / SAFETENSORS_WEIGHTS_NAME
            config: Any = model.peft_config[name]
            seal_tensors(weights, note_options(config))
            renew_digest(weights)


def write_card(model: PeftModel, original: Callable[..., Any], output_dir: str) -> None:
    """Write the card of the adapter in the folder itself, or of the active one if all are in subfolders.

    An existing card stays and gets the metadata that it lacks.
    """
    folder = Path(output_dir)
    config: Any = model.peft_config.get(_ADAPTER) or active_config(model)
    usage = Usage(config.base_model_name_or_path or "", config.revision)
    path = folder / CARD_FILE
    if path.exists():
        text = complete_card(path.read_text(encoding="utf-8"), base=usage.base)
    else:
        description = describe_blocks(config.num_blocks, config.block_size)
        text = render_card(folder.resolve().name, CardText(description, usage))
    path.write_text(text, encoding="utf-8")


def push_to_hub(
    model: PeftModel,
    original: Callable[..., Any],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    max_shard_size: Any = None,
) -> Any:
    """Save the model and upload it with its own card; transformers would replace the card by an empty one.

    Args:
        original: transformers' method; not used.
        repo_id: target repository; created if missing.
        token: as in ``huggingface_hub``.
        create_pr: upload as a pull request.
        max_shard_size: ignored, as an adapter is one file; transformers passes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return upload(
            HfApi(token=token),
            repo_id,
            {path.relative_to(folder).as_posix(): path for path in files},
            commit_message=commit_message or "Upload RIM adapter",
            commit_description=commit_description,
            private=private,
            revision=revision,
            create_pr=create_pr,
            tags=tags or (),
        )


def upload(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] = (),
    license: str | None = None,
) -> Any:
    """Upload files in one commit; the card names the adapter by its repository id.

    Args:
        repo_id: target repository; created if missing.
        files: contents or local paths, by path in the repository.
        tags: more tags for the card.
        license: the adapter's licence for the card, as an id on the Hub.

    Returns:
        ``huggingface_hub``'s ``CommitInfo``.

    Raises:
        huggingface_hub.errors.HFValidationError: the repository id is invalid.
    """
    validate_repo_id(repo_id)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):  # a pull request, for instance, has one already
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    contents = dict(files)
    card = contents.get(CARD_FILE)
    if card is not None:
        text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
        text = complete_card(name_adapter(text, repo_id), tags=tags, license=license)
        contents[CARD_FILE] = text.encode()
    return api.create_commit(
        repo_id,
        operations=[CommitOperationAdd(name, content) for name, content in sorted(contents.items())],
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _copy_papers(model: PeftModel, folder: Path) -> None:
    papers: Papers | None = vars(model.base_model).get("papers")
    if papers is None:
        return
    if _ADAPTER not in model.peft_config or papers.digest != _digest(model):
        del vars(model.base_model)["papers"]  # they describe the old weights
        if _is_same(folder / CARD_FILE, papers.files.get(CARD_FILE)):
            warnings.warn(
                f"{folder}: its card and records describe the previous weights, which are replaced now. Save other "
                "weights in another folder.",
                stacklevel=3,
            )
        return
    others = {name: path for name, path in papers.files.items() if name != CARD_FILE and path.is_file()}
    is_of_another_run = any(
        (folder / name).is_file() and not filecmp.cmp(folder / name, path, shallow=False)
        for name, path in others.items()
    )
    for name, path in papers.files.items():
        target = folder / name
        is_kept = name == CARD_FILE and target.exists() and not is_of_another_run  # its owner may have edited it
        if path.is_file() and not is_kept and not _is_same(target, path):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _is_same(target: Path, path: Path | None) -> bool:
    return path is not None and path.exists() and target.exists() and target.samefile(path)


def _digest(model: PeftModel) -> str:
    digest = hashlib.sha256()
    tensors = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
