"""A run's files: how they are written, which ones belong to its adapter, its record and its card."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from rim_peft.escaping import code_span, fence, markdown
from rim_peft.export.weights import STAGING
from rim_peft.methods import get_method
from rim_peft.recipe.syntax import read_yaml
from rim_peft.run.named_bases import parse_name, public_name
from rim_peft.tuner.card import CARD_FILE, CardText, Usage, describe_blocks, hub_id, render_card
from rim_peft.tuner.files import RECORD_FILE, check_files
from rim_peft.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
)


def write_files(folder: Path, save: Callable[[Path], None], *, last: str) -> None:
    """Let ``save`` write files to a temporary folder, and move them into ``folder`` when all are complete.

    The file ``last`` is moved last: if it exists, so do the others.
    """
    for left_behind in folder.glob(".partial-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        save(Path(partial))
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)


def describe_versions() -> dict[str, str]:
    """Return the versions of Python, this package and its main dependencies."""
    versions = {"python": platform.python_version(), "rim-peft": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # bitsandbytes is optional
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """Return a description of this machine."""
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return hardware


BASE_FOLDER = "base"
RECIPE_FILE = "recipe.yaml"
ADAPTER_FILE = CONFIG_NAME

_SUFFIXES = (".json", ".yaml", ".md", ".safetensors", ".jinja", ".model")
"""Suffixes of an adapter's files, its documents, its base and most tokenizers; no pickles."""

_TOKENIZER_FILES = ("merges.txt", "vocab.txt")

_LEFT_OUT = ("best.safetensors", "trainer_state.json")
"""Files that only a resumed training reads."""


def check_adapter(folder: Path) -> None:
    """Check that a folder holds an adapter with intact files.

    Raises:
        FileNotFoundError: there is none, or its training has not finished.
        ValueError: its files are damaged.
    """
    if not (folder / ADAPTER_FILE).exists():
        remedy = "Give the folder of an adapter."
        if (folder / RECIPE_FILE).exists():
            remedy = (
                f"Its training has not finished. If it is yours: rim-peft train {folder / RECIPE_FILE} "
                f"output_dir={folder} resume=true."
            )
        if (folder / STAGING).exists():
            remedy = "Its export has not finished: run the same rim-peft export again."
        raise FileNotFoundError(f"{folder}: must hold an adapter ({ADAPTER_FILE}), but does not. {remedy}")
    check_files(folder)


def shared_files(folder: Path, *, papers_only: bool = False) -> dict[str, Path]:
    """Return the files of an adapter's folder that others need, by their path in it.

    These are adapter, tokenizer, card, recipe and record, and the base if it is in the folder; not checkpoints.

    Args:
        folder: output folder of a run, or an adapter's folder.
        papers_only: omit the adapter's own two files.

    Raises:
        ValueError: one of them is a link out of the folder. Through such links a stranger's folder could have any
            file of this machine copied or uploaded.
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
                f"{folder}: its files must be in it, but {name} is a link to {path.resolve()}. Copy that file here if "
                "it belongs to the adapter, or remove the link."
            )
    return shared


def _is_own(folder: Path, path: Path) -> bool:
    """Tell whether a file is in a folder, or in the blobs that the Hub's cache links its folders to."""
    inside, target = folder.resolve(), path.resolve()
    in_cache = inside.parent.name == "snapshots" and target.is_relative_to(inside.parent.parent / "blobs")
    return target.is_relative_to(inside) or in_cache


def listed_files(folder: Path) -> list[str]:
    """Return the names of the files that a run's record lists: those that answers depend on and nobody should edit.

    ``adapter_config.json`` and ``recipe.yaml`` name folders, which may be moved. Their settings that answers depend on
    are noted with the weights and in the record instead.
    """
    return [name for name in shared_files(folder) if name not in (ADAPTER_FILE, RECIPE_FILE, RECORD_FILE, CARD_FILE)]


_STORY = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts does it take?"

_QUESTIONS = {
    **dict.fromkeys(("gsm8k", "gsm8k-aug", "gsm8k-aug-nl", "gsm-hard", "gsm-symbolic", "multiarith", "svamp"), _STORY),
    **dict.fromkeys(
        ("arc-easy", "arc-challenge", "commonsenseqa"),
        "Where does a cat look for mice?\nA. barn\nB. lake\nC. cloud\nD. oven\nE. clock",
    ),
    "aqua-rat": "A pen costs $3. What do 4 pens cost?\nA. $7\nB. $9\nC. $10\nD. $12\nE. $15",
    "bbh": "not ( True ) or ( not False ) is",
    "handfuls": "Ben has twice as many pens as Ann. Ann has 3 pens. How many pens does Ben have?",
    "logiqa": "All cats sleep at noon. Tom is a cat.\nWhat follows?\nA. Tom sleeps at noon.\nB. Tom sleeps at night.\n"
    "C. Tom never sleeps.\nD. Only Tom sleeps at noon.",
    "math": "What is the remainder when $7^2 + 5$ is divided by $8$?",
    "multiplication": "3 2 1 7 * 4 1 2 5",
    "ontology": "Every gerpus is a terpus. Bob is a gerpus. Is Bob a zhorpus or terpus?",
    "potions": "Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?",
    "prontoqa": "Every gerpus is a terpus. Terpuses are not slow. Bob is a gerpus. True or false: Bob is slow.",
    "prosqa": "Every gerpus is a terpus. Bob is a gerpus. Is Bob a terpus or zhorpus?",
    "rows": "A question like those of the training rows",
    "strategyqa": "Could a giraffe stand upright in a room with an ordinary ceiling?",
}
"""Example questions for the code in the card, in the task's own form."""


def render_run_card(name: str, record: Mapping[str, Any], recipe: str) -> str:
    """Return the card of a run's adapter.

    Args:
        name: name of its folder, or its id on the Hub.
        record: contents of ``run.json``.
        recipe: the recipe as run, as YAML.
    """
    data, base = record["data"], public_name(record["base"]) if record["base"] else record["base"]
    named = parse_name(base) if base else None  # if set, the base has a package's weights, which are not on the Hub
    usage = Usage(
        base if named is None else None,
        (read_yaml(recipe).get("model") or {}).get("revision"),
        has_tokenizer=True,
        template=data["prompt_template"],
        question=_QUESTIONS.get(data["task"], "..."),
    )
    sections = {
        "Results": _results(record),
        "Training": _training(record, usage.revision),
        "The same again": _again(record, recipe),
    }
    description = get_method(record["method"]).description.format(blocks=describe_blocks(**record["blocks"]))
    if named is not None:
        description += (
            f"\nIts base is {named[0].hub_id} as the package `{named[0].package}` has it, rounded to "
            f"{named[0].quantization}: `rim-peft base {base}`."
        )
    results = _eval_results(record)
    dataset = hub_id(data["path"])
    metadata: dict[str, Any] = {"datasets": [dataset] if dataset else None, "eval_results": results or None}
    metadata["base_model"] = None if named is None else named[0].hub_id
    return render_card(name, CardText(description, usage, sections, {key: of for key, of in metadata.items() if of}))


def _eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    validation, data = record["metrics"]["validation"], record["data"]
    if validation is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_id(data["path"]) or data["task"],
            dataset_name=data["task"],
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=f"accuracy (answer rule {validation['answer_rule']})",
            metric_value=validation["accuracy"],
            metric_args={"standard_error": validation["standard_error"], "num_rows": validation["num_rows"]},
        )
    ]


def _results(record: Mapping[str, Any]) -> str:
    validation = record["metrics"]["validation"]
    if validation is None:
        return "The run had no validation rows, so the last weights were kept and nothing was measured."
    cells = (
        f"{validation['num_rows']} for validation",
        markdown(validation["answer_rule"]),
        f"{validation['accuracy']:.3f}",
        f"{validation['standard_error']:.3f}",
    )
    return (
        f"| rows | answer rule | accuracy | standard error |\n|---|---|---|---|\n| {' | '.join(cells)} |\n\n"
        "The same rows chose the best weights, so expect a little less on a test split: "
        + code_span(f"rim-peft evaluate FOLDER --task {record['data']['task']} --split test")
        + "."
    )


def _training(record: Mapping[str, Any], revision: str | None) -> str:
    data, parameters, best = record["data"], record["parameters"], record["metrics"].get("best")
    base = "built from the recipe's configuration, in the folder `base`"
    if record["base"] is not None:
        base = _code(record["base"]) + (f", revision {_code(revision)}" if revision else "")
    resumed = " after it was last resumed" if record["resumed"] else ""
    versions = markdown(", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()))
    hardware = record.get("hardware", {})
    machine = markdown(", ".join(hardware.get("gpus") or [f"{hardware.get('cpu_cores', '?')} CPU cores"]))
    lines = {
        "base": base,
        "method": _code(record["method"]),
        "task": _code(data["task"]),
        "training rows": _rows(data["train"], data["path"]),
        "validation rows": _rows(data.get("validation"), data["path"]),
        "seed": record["seed"],
        "parameters trained": f"{parameters['trainable']:,} of {parameters['all']:,}",
        "best weights": markdown(f"stage {best['stage']}, step {best['step']}") if best else "the last",
        "time": f"{record['wall_seconds']} s{resumed}, on {machine}",
        "made with": versions,
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in lines.items() if value != "")


def _rows(rows: Mapping[str, Any] | None, path: str | None) -> str:
    """Return the number of rows, their source and their hash."""
    if rows is None:
        return "none"
    origin = f" of {_code(path)}" if path else ""
    if "sha256" not in rows:
        return f"streamed{origin}" if rows.get("streamed") else f"{rows['num_rows']}{origin}"
    return f"{rows['num_rows']}{origin}, SHA-256 {_code(rows['sha256'])}"


def _code(text: str) -> str:
    return code_span(text, in_table=True)


def _again(record: Mapping[str, Any], recipe: str) -> str:
    command = shlex.join(record.get("command") or []) or "rim-peft train recipe.yaml output_dir=FOLDER"
    return (
        f"The adapter was trained by\n\n{fence(command, 'bash')}\n\n"
        "`recipe.yaml` beside this card is the recipe as run, with everything that the command line changed "
        "(`rim-peft train recipe.yaml output_dir=FOLDER` runs it again); `run.json` has all figures.\n\n"
        f"<details><summary>recipe.yaml</summary>\n\n{fence(recipe.strip(), 'yaml')}\n\n</details>"
    )
