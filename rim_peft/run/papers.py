"""Which files of a run's folder belong to its adapter, and go with it wherever it goes."""

from __future__ import annotations

from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from rim_peft.export.options import STAGING
from rim_peft.tuner.card import CARD_FILE
from rim_peft.tuner.files import RECORD_FILE, check_files

BASE_FOLDER = "base"
RECIPE_FILE = "recipe.yaml"
ADAPTER_FILE = CONFIG_NAME

_SUFFIXES = (".json", ".yaml", ".md", ".safetensors", ".jinja", ".model")
"""Of an adapter, its papers, its base and most tokenizers; pickles are not among them."""

_TOKENIZER_FILES = ("merges.txt", "vocab.txt")

_LEFT_OUT = ("best.safetensors", "trainer_state.json")
"""What only a training that goes on reads."""


def check_adapter(folder: Path) -> None:
    """Check that a folder holds an adapter whose files are whole.

    Raises:
        FileNotFoundError: there is none, or its training has not ended.
        ValueError: its files are damaged.
    """
    if not (folder / ADAPTER_FILE).exists():
        remedy = "Give the folder of an adapter."
        if (folder / RECIPE_FILE).exists():
            remedy = (
                f"Its training has not ended. If it is yours: rim-peft train {folder / RECIPE_FILE} "
                f"output_dir={folder} resume=true."
            )
        if (folder / STAGING).exists():
            remedy = "Its export has not ended: give the same rim-peft export again."
        raise FileNotFoundError(f"{folder}: must hold an adapter ({ADAPTER_FILE}), and does not. {remedy}")
    check_files(folder)


def shared_files(folder: Path, *, papers_only: bool = False) -> dict[str, Path]:
    """Return the files of an adapter's folder that others need, by their path in it.

    These are adapter, tokenizer, card, recipe and record, and the base if it lies in the folder; not checkpoints.

    Args:
        folder: output folder of a run, or an adapter's folder.
        papers_only: without the adapter's own two files.

    Raises:
        ValueError: one of them is a link out of the folder, by which a stranger's folder could have any file of this
            machine copied or uploaded.
    """
    left_out = (*_LEFT_OUT, *((ADAPTER_FILE, SAFETENSORS_WEIGHTS_NAME) if papers_only else ()))
    paths = sorted([*folder.glob("*"), *folder.glob(f"{BASE_FOLDER}/*")])
    shared = {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.is_file()
        and (path.suffix in _SUFFIXES or path.name in _TOKENIZER_FILES)
        and path.name not in left_out
        and not path.name.startswith(".")
    }
    for name, path in shared.items():
        if not _is_own(folder, path):
            raise ValueError(
                f"{folder}: its files must lie in it, and {name} is a link to {path.resolve()}. Copy that file here if "
                "it belongs to the adapter, or remove the link."
            )
    return shared


def _is_own(folder: Path, path: Path) -> bool:
    """Tell whether a file lies in a folder, or among the contents that the Hub's cache links its folders to."""
    inside, target = folder.resolve(), path.resolve()
    in_cache = inside.parent.name == "snapshots" and target.is_relative_to(inside.parent.parent / "blobs")
    return target.is_relative_to(inside) or in_cache


def listed_files(folder: Path) -> list[str]:
    """Names of a run's files that its record lists: those that answers depend on, but for what people may edit.

    ``adapter_config.json`` and ``recipe.yaml`` name folders, which may be moved: what answers depend on in them is
    noted with the weights and in the record.
    """
    return [name for name in shared_files(folder) if name not in (ADAPTER_FILE, RECIPE_FILE, RECORD_FILE, CARD_FILE)]
