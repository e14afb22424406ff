"""Assemble the report of a results document: its sections, and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_peft.comparison.numbers import count
from rim_peft.comparison.plots.style import Plot
from rim_peft.comparison.report.answers import (
    tabulate_ablations,
    tabulate_accuracy,
    tabulate_latency,
    tabulate_pairs,
    tabulate_states,
)
from rim_peft.comparison.report.blocks import (
    tabulate_blocks,
    tabulate_budget,
    tabulate_controls,
    tabulate_faithfulness,
    tabulate_probe,
    tabulate_selection,
)
from rim_peft.comparison.report.content import Bullets, Part, PlotsOf, Report, Section, Table
from rim_peft.comparison.report.result import state_result
from rim_peft.comparison.report.setting import describe_setting, list_runs, tabulate_search
from rim_peft.comparison.results import Results

_PARTS = {
    "blocks": "readouts by block and any-block accuracy",
    "selection": "selection of one answer",
    "probe": "the probe",
    "budget": "the budget of blocks",
    "controls": "controls",
    "faithfulness": "faithfulness",
}
"""Names of the measurements of single runs."""


def build_report(
    document: Mapping[str, Any], plots: Sequence[Plot] | None = None, *, questions: str | None = None
) -> Report:
    """Return the report of a results document: the result first, what it was made of last.

    Args:
        document: the results document.
        plots: plots drawn of it; None for a report that does not mention plots.
        questions: the page of some of the test questions, as a path from the report; None if there is none.
    """
    results = Results(document)

    def of(topic: str) -> Sequence[Part]:
        return [plot for plot in plots or () if plot.topic == topic]

    sections = [state_result(results, of, questions), *_accuracy(results, of)]
    if document.get("pairs"):
        sections.append(tabulate_pairs(results))
    sections += _looked_into(results, of)
    if document.get("latency"):
        sections.append(tabulate_latency(results, of))
    if _states(results):
        sections.append(tabulate_states(results, of))
    if missing := list_missing(results):
        sections.append(Section("Not measured", (Bullets(missing),)))
    if document.get("search"):
        sections.append(tabulate_search(results))
    sections.append(list_runs(results))
    if plots is not None:
        sections.append(_list_plots(plots))
    sections.append(describe_setting(results))
    kind = "Ablation" if results.is_ablation else "Comparison"
    return Report(f"{kind}: {document['name']}", _facts(document), sections)


def _facts(document: Mapping[str, Any]) -> str:
    """Return what was compared in one line; the last section has it whole."""
    base, rows = document["base"], (document["data"].get("test") or {}).get("num_rows")
    seeds = sorted({run["seed"] for run in document["runs"]})
    shown = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    model = f"{base['name']}, {count(base['parameters'])} parameters"
    return f"{document['task']['name']} on {model}; {count(rows)} test rows, {shown}"


def _accuracy(results: Results, of: PlotsOf) -> list[Section]:
    ablations = tabulate_ablations(results, of) if results.is_ablation else []
    return [*ablations, tabulate_accuracy(results, of)]


def _looked_into(results: Results, of: PlotsOf) -> list[Section]:
    makers = {
        "blocks": lambda: tabulate_blocks(results, of),
        "selection": lambda: tabulate_selection(results),
        "probe": lambda: tabulate_probe(results, of),
        "budget": lambda: tabulate_budget(results, of),
        "controls": lambda: tabulate_controls(results, of),
        "faithfulness": lambda: tabulate_faithfulness(results),
    }
    return [make() for part, make in makers.items() if results.having(part)]


def list_missing(results: Results) -> list[str]:
    """Return one sentence for each part that was not measured, or not for all methods with stages."""
    document = results.document
    lines = []
    for part, words in _PARTS.items():
        there = [method.name for method in results.having(part)]
        absent = [m.label for m in results.methods if m.method == "rim" and m.name not in there]
        if not there:
            lines.append(f"{_capital(words)}: not measured.")
        elif absent:
            measured = [method.label for method in results.having(part)]
            few, sign = (absent, "not measured") if len(absent) < len(measured) else (measured, "measured only")
            lines.append(f"{_capital(words)}: {sign} of {', '.join(few)}.")
    if not results.lengths:
        lines.append("Accuracy by number of steps: not measured, the rows have no steps.")
    if not document.get("pairs"):
        lines.append("Paired differences: not measured.")
    if not document.get("latency"):
        lines.append("Latency: not measured.")
    if "blocks" not in _states(results):
        lines.append("Principal components of the states over blocks: not measured.")
    if "training" not in _states(results):
        lines.append("Principal components of the states over training: not measured.")
    return lines


def _states(results: Results) -> list[str]:
    found = results.document.get("representations") or {}
    return [key for key in ("blocks", "training") if (found.get(key) or {}).get("points")]


def _list_plots(plots: Sequence[Plot]) -> Section:
    if not plots:
        return Section("Plots", ("None were drawn.",))
    rows = [(plot.title, *(f"{plot.folder.name}/{path.name}" for path in (plot.png, plot.svg))) for plot in plots]
    return Section("Plots", (Table("Files", ("plot", "PNG", "SVG"), rows, num_text_columns=3),))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
