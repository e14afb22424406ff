"""Tables of what other blocks do (fewer, more, disturbed ones), and of the steps that blocks state."""

from __future__ import annotations

from collections.abc import Mapping

from rim_peft.comparison.numbers import count, share_of, share_with_interval, significant, steps
from rim_peft.comparison.pooled import Results, group, mean, pool, pool_lengths
from rim_peft.comparison.report.content import PlotsOf, Section, Table
from rim_peft.evaluation.accuracy import Score


def tabulate_budget(results: Results, plots: PlotsOf) -> Section:
    """Return accuracy and times for numbers of blocks that a trained adapter is given."""
    tables = []
    for method in results.having("budget"):
        parts = results.parts(method.name, "budget")
        rows = []
        for num_blocks, entries in group(parts, lambda entry: entry["num_blocks"]).items():
            lengths = pool_lengths(entry.get("by_length") for entry in entries)
            times = [mean(entry.get(key) for entry in entries) for key in ("first_token_ms", "answer_ms")]
            score = share_with_interval(pool(entry["accuracy"] for entry in entries))
            by_length = [share_of(lengths.get(length)) for length in results.lengths]
            rows.append((str(num_blocks), score, *(significant(time) for time in times), *by_length))
        columns = ("blocks", "accuracy", "first token (ms)", "answer (ms)", *(steps(n) for n in results.lengths))
        note = (
            f"Seeds: {results.seeds(method.name, 'budget')}; milliseconds are means over seeds, of single questions "
            "with LoRA not merged, taken when each run was measured: other processes may have run beside it. The "
            "latency table is taken alone, with LoRA merged."
        )
        tables.append(Table(f"{method.label}: blocks at inference", columns, rows, notes=(note,)))
    return Section("Budget", (*tables, *plots("budget")))


def tabulate_controls(results: Results, plots: PlotsOf) -> Section:
    """Return accuracy with the blocks disturbed."""
    rule = results.document["task"]["answer_rule"]
    tables = []
    for method in results.having("controls"):
        intact = pool(run["accuracy"].get(rule) for run in results.runs(method.name))
        lengths = pool_lengths(run.get("by_length") for run in results.runs(method.name))
        rows = [("nothing disturbed", "the method as it is", *_control_cells(results, intact, lengths, None))]
        for name, entries in group(results.parts(method.name, "controls"), lambda entry: entry["name"]).items():
            lengths = pool_lengths(entry.get("by_length") for entry in entries)
            scores = [pool(entry.get(key) for entry in entries) for key in ("accuracy", "follows")]
            description = str(entries[0].get("description") or "")
            rows.append((str(name), description, *_control_cells(results, scores[0], lengths, scores[1])))
        columns = ("control", "what is done", "accuracy", "follows", *(steps(n) for n in results.lengths))
        note = (
            f"Seeds: {results.seeds(method.name, 'controls')}. Follows: the answer is the one that the swapped states "
            "imply: the other question's own where all blocks are swapped; after the first t, what the question's "
            "remaining steps make of the other's value. Swaps are judged on the rows that have a partner."
        )
        tables.append(Table(f"{method.label}: controls", columns, rows, num_text_columns=2, notes=(note,)))
    return Section("Controls", (*tables, *plots("controls")))


def _control_cells(
    results: Results, accuracy: Score | None, lengths: Mapping[str, Score], follows: Score | None
) -> list[str]:
    by_length = [share_of(lengths.get(length)) for length in results.lengths]
    return [share_with_interval(accuracy), share_with_interval(follows), *by_length]


def tabulate_faithfulness(results: Results) -> Section:
    """Return how often blocks state the right step, and whether wrong steps go with wrong answers."""
    tables = []
    for method in results.having("faithfulness"):
        parts = results.parts(method.name, "faithfulness")
        blocks = group([part["by_block"] for part in parts], lambda entry: entry["block"])
        rows = [
            (f"block {block} states the right step", pool(entry["step_right"] for entry in entries))
            for block, entries in blocks.items()
        ]
        rows += [
            (words, pool(part.get(key) for part in parts))
            for words, key in (
                ("answer right if all steps are right", "answer_right_if_steps_right"),
                ("answer right if a step is wrong", "answer_right_if_a_step_wrong"),
            )
        ]
        cells = [(words, share_with_interval(score), count(score.num_rows if score else 0)) for words, score in rows]
        stages = ", ".join(dict.fromkeys(str(part["stage"]) for part in parts))
        note = f"Seeds: {results.seeds(method.name, 'faithfulness')}; weights after the stage {stages}."
        tables.append(Table(f"{method.label}: steps", ("what", "share", "rows"), cells, notes=(note,)))
    return Section("Faithfulness", tables)
