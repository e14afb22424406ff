"""The report's first section: what came out, in three sentences, one plot and one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rim_peft.comparison.numbers import NONE, count, difference, p_value, ratio, share_in_interval
from rim_peft.comparison.report.content import Link, Part, PlotsOf, Section, Table
from rim_peft.comparison.results import Method, Results, pool
from rim_peft.evaluation.scores import Score


def state_result(results: Results, plots: PlotsOf, questions: str | None) -> Section:
    """Return the result.

    Args:
        results: the results, by method.
        plots: topic → plots.
        questions: the page of some of the test questions, as a path from the report; None if there is none.
    """
    parts: list[Part] = [_reference(results), _best_other(results), _time(results)]
    if questions is not None:
        label = results.label(results.reference)
        parts.append(Link(f"Ten test questions, right and wrong: what {label} held after each block", questions))
    return Section("Result", (*parts, _table(results), *plots("result")))


def _reference(results: Results) -> str:
    runs = results.runs(results.reference)
    seeds = "with one seed" if len(runs) == 1 else f"{len(runs)} seeds together"
    score = _score(results, results.reference)
    rows = count(score.num_rows // len(runs)) if score else NONE
    label = results.label(results.reference)
    return f"“{label}” answers {share_in_interval(score)} of {rows} test questions right, {seeds}."


def _best_other(results: Results) -> str:
    scores = {m.name: _score(results, m.name) for m in results.methods if m.name != results.reference}
    there = {name: score for name, score in scores.items() if score is not None}
    if not there:
        return "There is no other method."
    best = max(there, key=lambda name: there[name].accuracy)
    kind = "setting" if results.is_ablation else "method"
    pair = results.pair(best)
    told = "" if pair is None else f", {difference_of(pair)} on the same rows (p {p_value(pair['p_value'])})"
    return f"The best other {kind}, “{results.label(best)}”, answers {share_in_interval(there[best])}{told}."


def _time(results: Results) -> str:
    found = _ratios(results)
    own = found.get(results.reference)
    if own is None:
        return "Times were not compared."
    slowest = max(found, key=lambda name: found[name])
    other = "" if slowest == results.reference else f", “{results.label(slowest)}” {ratio(found[slowest])}"
    label = results.label(results.reference)
    return f"To an answer, “{label}” takes {ratio(own)} the time of answering at once{other} ({_case(results)})."


def _table(results: Results) -> Table:
    ratios = _ratios(results)
    rows = []
    for method in results.methods:
        pair = results.pair(method.name)
        cells = [share_in_interval(_score(results, method.name)), NONE if pair is None else difference_of(pair)]
        rows.append((marked(results, method), *cells, ratio(ratios.get(method.name))))
    rule = results.document["task"]["answer_rule"]
    columns = ("method", f"accuracy ({rule})", f"difference from {results.label(results.reference)}", "time, ratio")
    note = (
        "In brackets the 95 % interval over the rows of all seeds; differences are on the same rows, ± standard error. "
        + (f"Time to an answer, as a ratio to answering at once: {_case(results)}." if ratios else "Times: none taken.")
    )
    return Table("What came out", columns, rows, notes=(note,))


def marked(results: Results, method: Method) -> str:
    """Return a method's label, which says so if it is the reference."""
    return f"{method.label} (reference)" if method.name == results.reference else method.label


def _score(results: Results, name: str) -> Score | None:
    rule = results.document["task"]["answer_rule"]
    return pool(run["accuracy"].get(rule) for run in results.runs(name))


def difference_of(pair: Mapping[str, Any]) -> str:
    """Return the method minus the reference; the document stores the opposite sign."""
    return difference(-pair["difference"], pair["standard_error"])


def _latency(results: Results) -> list[Mapping[str, Any]]:
    """Return the rows of the first batch size and prompt length."""
    rows: list[Mapping[str, Any]] = list(results.document.get("latency") or [])
    cases = ("batch_size", "prompt_tokens")
    return [row for row in rows if [row[key] for key in cases] == [rows[0][key] for key in cases]]


def _ratios(results: Results) -> dict[str, float]:
    found = {row["name"]: row.get("answer_ratio") for row in _latency(results)}
    return {name: value for name, value in found.items() if value is not None}


def _case(results: Results) -> str:
    first = _latency(results)[0]
    return f"batch of {first['batch_size']}, prompts of {first['prompt_tokens']} tokens"
