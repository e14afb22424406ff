"""Report sections about the setting: what was compared, by which methods, trials and runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rim_peft.comparison.numbers import NONE, count, setting, share, share_with_error
from rim_peft.comparison.report.content import Code, Section, Table
from rim_peft.comparison.results import Results
from rim_peft.evaluation.scores import Score

_HASH_DIGITS = 16


def describe_setting(results: Results) -> Section:
    """Return the section that describes what was compared."""
    document = results.document
    task, base = document["task"], document["base"]
    seeds = list(dict.fromkeys(run["seed"] for run in document["runs"]))
    facts = [
        ("task", task["name"]),
        ("task options", _assignments(task.get("options") or {})),
        ("answer rules", ", ".join(task["answer_rules"])),
        ("rule that decides", task["answer_rule"]),
        ("base", f"{base['name']}, {count(base['parameters'])} parameters"),
        ("reference", results.label(results.reference)),
        ("seeds", ", ".join(str(seed) for seed in seeds)),
        ("hardware", _assignments(document["hardware"])),
        ("versions", ", ".join(f"{package} {version}" for package, version in document["versions"].items())),
        ("started, finished", f"{document['started']}, {document['finished']}"),
    ]
    return Section(
        "What was compared",
        (
            Code(shlex.join(document["command"])),
            Table("Setting", ("what", "value"), facts, num_text_columns=2),
            _rows(document["data"]),
            _methods(results),
        ),
    )


def _rows(data: Mapping[str, Any]) -> Table:
    uses = {"train": "training", "selection": "selection (searched values, probe)", "test": "test (all figures)"}
    rows = [
        (uses.get(split, split), str(entry.get("sha256") or NONE)[:_HASH_DIGITS], count(entry.get("num_rows")))
        for split, entry in data.items()
        if entry
    ]
    note = f"The first {_HASH_DIGITS} digits of the hashes; results.json has them whole."
    return Table("Rows", ("for", "SHA-256", "rows"), rows, num_text_columns=2, notes=(note, *_absent(data, uses)))


def _absent(data: Mapping[str, Any], uses: Mapping[str, str]) -> list[str]:
    return [f"No rows are recorded for {use}." for split, use in uses.items() if not data.get(split)]


def _methods(results: Results) -> Table:
    rows = [
        (
            method.label,
            method.name,
            method.method,
            method.view,
            _assignments(method.changes) or "nothing",
        )
        for method in results.methods
    ]
    note = "Changes are recipe keys that depart from the shared recipe; equal means equal to the reference's."
    columns = ("method", "name", "answers by", "equal", "changes")
    return Table("Methods", columns, rows, num_text_columns=5, notes=(note,))


def tabulate_search(results: Results) -> Section:
    """Return the section that lists the values tried and the values chosen."""
    rows = [
        (
            results.label(trial["name"]),
            _assignments(trial["values"]),
            share_with_error(Score(trial["score"]["num_correct"], trial["score"]["num_rows"])),
            "yes" if trial["is_chosen"] else "",
        )
        for trial in results.document["search"]
    ]
    rule, seeds = results.document["task"]["answer_rule"], {trial["seed"] for trial in results.document["search"]}
    note = (
        f"Judged on the selection rows with seed {', '.join(map(str, sorted(seeds)))}; the chosen values are used "
        "with every seed. The test rows were not read."
    )
    columns = ("method", "values", f"accuracy ({rule})", "chosen")
    return Section(
        "Values chosen", (Table("Trials on the selection rows", columns, rows, num_text_columns=2, notes=(note,)),)
    )


def list_runs(results: Results) -> Section:
    """Return the section that lists every run with its cost."""
    rule = results.document["task"]["answer_rule"]
    rows = []
    for run in results.document["runs"]:
        training = run.get("training") or {}
        rows.append(
            (
                results.label(run["name"]),
                run["folder"],
                str(run.get("recipe_sha256") or NONE)[:_HASH_DIGITS],
                str(run["seed"]),
                share(run["accuracy"][rule]["accuracy"]),
                count(training.get("num_samples")),
                count(training.get("num_tokens")),
                count(training.get("seconds")),
            )
        )
    columns = ("method", "folder", "recipe, SHA-256", "seed", f"accuracy ({rule})", "samples", "tokens", "training (s)")
    note = "Seconds are those of the training where it ran; other work on the machine is in them."
    return Section("Runs", (Table("Every run", columns, rows, num_text_columns=3, notes=(note,)),))


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={setting(value)}" for key, value in values.items())
