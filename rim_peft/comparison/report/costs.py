"""Tables of times and memory, and the figures of the states."""

from __future__ import annotations

from rim_peft.comparison.numbers import count, percent, ratio, significant
from rim_peft.comparison.pooled import Results
from rim_peft.comparison.report.content import PlotsOf, Section, Table


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
    """Return how much of the states' variance the drawn components hold."""
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
