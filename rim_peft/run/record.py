"""What a run says of itself: versions and hardware for its record, and the model card of its adapter."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from huggingface_hub import EvalResult

from rim_peft.escaping import code_span, fence, markdown
from rim_peft.methods import get_method
from rim_peft.recipe.syntax import read_yaml
from rim_peft.run.named_bases import parse_name, public_name
from rim_peft.tuner.card import CardText, Usage, describe_blocks, hub_id, render_card
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
