"""A run's folder → the Hub: adapter, tokenizer, card, recipe and record in one commit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from rim_peft.data.hub import hub_problem
from rim_peft.run.papers import ADAPTER_FILE, BASE_FOLDER, check_adapter, shared_files
from rim_peft.tuner.card import CARD_FILE, CardText, Usage, describe_blocks, hub_id, name_base, read_card, render_card
from rim_peft.tuner.registration import NAME
from rim_peft.tuner.sharing import upload
from rim_peft.tuner.tensors import not_finite

logger = logging.getLogger(__name__)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    base: str | None = None,
) -> str:
    """Upload an adapter with all that it needs elsewhere, without checkpoints, and return the commit's address.

    In the repository the card calls the adapter by its id, and ``adapter_config.json`` names a base that others can
    load. The folder itself stays as it is.

    Args:
        folder: output folder of a run, or an adapter's folder.
        repo_id: ``owner/name``, or a name of your own; made if need be.
        private: whether a new repository is private.
        revision: branch; made if need be.
        message: title of the commit.
        licence: id of the adapter's licence on the Hub, such as ``apache-2.0``.
        base: Hub id of the base, if the adapter was trained on a copy in a folder.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: its files are damaged, it is of another kind, others could not load its base, or the Hub refuses
            the card.
        PermissionError: the Hub lets you not write there.
        ConnectionError: the Hub cannot be reached.
    """
    folder = Path(folder)
    check_adapter(folder)
    if (found := not_finite(load_file(folder / SAFETENSORS_WEIGHTS_NAME))) is not None:
        raise ValueError(
            f"{folder}: its weights must be finite to be shared, {found}: its training had diverged. Train it again "
            "with a lower learning_rate."
        )
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
    if (problem := hub_problem()) is not None:
        raise ConnectionError(f"{repo_id}: cannot be uploaded: {problem}. Run it again when it can.")
    if licence is None and read_card(card).data.get("license") is None:
        logger.warning("the card names no licence, so others do not know whether they may use it: --license adds one.")
    try:
        commit = upload(
            HfApi(),
            repo_id,
            files,
            commit_message=message or "Upload adapter",
            private=private,
            revision=revision,
            licence=licence,
        )
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"{repo_id}: the Hub must let you write there, and does not ({error.response.status_code}). Log in "
                "with a token that can write (hf auth login), or set HF_TOKEN."
            ) from error
        raise
    return str(commit.commit_url)


def _public_base(folder: Path, named: str | None, base: str | None) -> str:
    """Return the name of the base under which others find it."""
    found = hub_id(base if base is not None else named)
    if found is None:
        raise ValueError(
            f"base: must be an id on the Hub, so that others can load it, got {(base or named)!r} in {folder}. Give "
            "the id of the model that it is a copy of (--base), or push your own base first."
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
