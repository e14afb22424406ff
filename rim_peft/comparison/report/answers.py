"""Report sections about the accuracy of answers, and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_peft.comparison.numbers import (
    NONE,
    count,
    p_value,
    percent,
    ratio,
    share,
    share_with_error,
    share_with_interval,
    significant,
    steps,
)
from rim_peft.comparison.plots.answers import changed_key, changed_keys, changed_value, topic
from rim_peft.comparison.report.content import PlotsOf, Section, Table
from rim_peft.comparison.report.result import difference_of, marked
from rim_peft.comparison.results import Method, Results, pool

_ERRORS = (
    "± is the standard error and in brackets stands the 95 % interval (Wilson), both over the test rows of all seeds "
    "together. Seeds judge the same rows, which the interval takes as independent: with several it is too narrow. "
    "How far trainings differ is the seed spread, the standard deviation of the seeds' accuracies."
)


def tabulate_accuracy(results: Results, plots: PlotsOf) -> Section:
    """Return what the methods trained on with their accuracy, and accuracy by number of steps."""
    return Section("Accuracy", (_main(results), *_by_length(results), *plots("lengths")))


def _main(results: Results) -> Table:
    rows = []
    for method in results.methods:
        rows.append(
            (
                marked(results, method),
                method.view if results.parts(method.name, "training") else NONE,
                str(len(results.runs(method.name))),
                count(results.mean(method.name, "num_samples")),
                count(results.mean(method.name, "num_tokens")),
                count(results.mean(method.name, "trainable_parameters")),
                *_by_rule(results, method.name),
                share(results.summary(method.name).get("seed_std")),
            )
        )
    columns = (
        "method",
        "equal",
        "seeds",
        "training samples",
        "training tokens",
        "trained parameters",
        *_rule_headings(results),
        "seed spread",
    )
    equal = (
        "Equal says what a method has in common with the reference: the number of training samples, the compute "
        "(tokens), or neither (own); samples and tokens are means over seeds."
    )
    absent = f"{NONE}: not trained, or one seed alone."
    return Table("Right answers on the test rows", columns, rows, num_text_columns=2, notes=(_ERRORS, equal, absent))


def _rule_headings(results: Results) -> list[str]:
    deciding = results.document["task"]["answer_rule"]
    return [f"accuracy, {rule}{' (decides)' if rule == deciding else ''}" for rule in _rules(results)]


def _rules(results: Results) -> list[str]:
    """Return the answer rules, the deciding one first."""
    task = results.document["task"]
    return sorted(task["answer_rules"], key=lambda rule: rule != task["answer_rule"])


def _by_rule(results: Results, name: str) -> list[str]:
    deciding, *others = [pool(run["accuracy"].get(rule) for run in results.runs(name)) for rule in _rules(results)]
    return [share_with_interval(deciding), *(share_with_error(score) for score in others)]


def _by_length(results: Results) -> list[Table]:
    if not results.lengths:
        return []
    rows = []
    for method in results.methods:
        lengths = results.summary(method.name).get("by_length") or {}
        rows.append((marked(results, method), *(_length_cell(lengths.get(length)) for length in results.lengths)))
    columns = ("method", *(steps(length) for length in results.lengths))
    rule = results.document["task"]["answer_rule"]
    note = f"Rule {rule}; in brackets the 95 % interval over the rows of all seeds, behind it the seed spread."
    return [Table("Accuracy by number of reasoning steps", columns, rows, notes=(note,))]


def _length_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return NONE
    deviation = entry.get("seed_std")
    spread = "" if deviation is None else f", {share(deviation)}"
    return f"{share(entry['accuracy'])} ({share(entry['low'])}–{share(entry['high'])}){spread}"


def tabulate_ablations(results: Results, plots: PlotsOf) -> list[Section]:
    """Return one section for each changed key, with the shared setting first."""
    sections = []
    for number, key in enumerate(changed_keys(results), start=1):
        methods = [m for m in results.methods if m.name == results.reference or changed_key(m) == key]
        methods.sort(key=lambda method: method.name != results.reference)
        sections.append(Section(f"Changed: {key}", (_grid(results, key, methods), *plots(topic(number)))))
    return sections


def _grid(results: Results, key: str, methods: Sequence[Method]) -> Table:
    rows = []
    for method in methods:
        lengths = results.summary(method.name).get("by_length") or {}
        pair = results.pair(method.name)
        is_reference = method.name == results.reference
        value = changed_value(method) if method.changes or not is_reference else "as shared"
        rows.append(
            (
                f"{value} (reference)" if is_reference else value,
                str(len(results.runs(method.name))),
                *_by_rule(results, method.name),
                share(results.summary(method.name).get("seed_std")),
                difference_of(pair) if pair else NONE,
                p_value(pair["p_value"]) if pair else NONE,
                *(share(lengths[length]["accuracy"]) if length in lengths else NONE for length in results.lengths),
            )
        )
    columns = (
        key,
        "seeds",
        *_rule_headings(results),
        "seed spread",
        "difference from reference",
        "p",
        *(steps(length) for length in results.lengths),
    )
    return Table(f"Right answers by {key}", columns, rows, notes=(_ERRORS,))


def tabulate_pairs(results: Results) -> Section:
    """Return every method's difference from the reference on the same rows."""
    rows = []
    for pair in results.document["pairs"]:
        cells = [
            difference_of(pair),
            count(pair["only_other"]),
            count(pair["only_reference"]),
            p_value(pair["p_value"]),
        ]
        rows.append((results.label(pair["name"]), str(pair["seed"]), count(pair["num_rows"]), *cells))
    reference = results.label(results.reference)
    columns = (
        "method",
        "seed",
        "rows",
        f"difference from {reference}",
        "only it right",
        f"only {reference} right",
        "p",
    )
    notes = (
        f"Accuracy of the method less that of {reference} on the same rows, ± standard error; p-values are McNemar's, "
        "not adjusted for the number of comparisons.",
        "p holds the trained weights fixed: it says whether these adapters differ on rows like these. Two seeds of one "
        "method may differ as much; how far seeds lie apart stands under accuracy.",
        "All seeds together: a row's verdicts are averaged over the seeds before the rows' spread is taken; p is that "
        "of a normal distribution, and at least that of a sign-flip test.",
    )
    return Section("Paired differences", (Table(f"Methods beside {reference}", columns, rows, notes=notes),))


def tabulate_latency(results: Results, plots: PlotsOf) -> Section:
    """Return times to an answer, with ratios to answering at once."""
    rows = [
        (
            results.label(row["name"]),
            count(row["batch_size"]),
            count(row["prompt_tokens"]),
            significant(row["first_token_ms"]),
            ratio(row.get("first_token_ratio")),
            significant(row["answer_ms"]),
            ratio(row.get("answer_ratio")),
            significant(row.get("num_tokens")),
            count(row.get("peak_memory_mb")),
        )
        for row in results.document["latency"]
    ]
    columns = (
        "method",
        "batch",
        "prompt (tokens)",
        "first token (ms)",
        "first token, ratio",
        "answer (ms)",
        "answer, ratio",
        "generated (tokens)",
        "peak memory (MB)",
    )
    note = "Medians; ratios are to answering at once with the same batch size and prompt length."
    table = Table("Time to an answer", columns, rows, notes=(note,))
    return Section("Latency", (table, *plots("latency")))


def tabulate_states(results: Results, plots: PlotsOf) -> Section:
    """Return the share of the states' variance in the plotted components."""
    names = {"blocks": "over blocks", "training": "over training"}
    rows = []
    for key, words in names.items():
        part = results.document["representations"].get(key)
        if part and part["points"]:
            shares = [percent(value) for value in [*part["explained_variance"], None, None][:2]]
            rows.append((words, count(len(part["points"])), *shares))
    columns = ("states", "points", "component 1", "component 2")
    table = Table("Principal components of the blocks' states, share of the variance", columns, rows)
    return Section("Representations", (table, *plots("representations")))
