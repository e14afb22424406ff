"""Report sections about a model's blocks, and about replaced blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rim_peft.comparison.numbers import (
    NONE,
    count,
    percent,
    share,
    share_of,
    share_with_error,
    share_with_interval,
    significant,
    steps,
)
from rim_peft.comparison.plots.blocks import WAYS
from rim_peft.comparison.report.content import PlotsOf, Section, Table, beside
from rim_peft.comparison.results import Method, Results, group, mean, pool, pool_lengths
from rim_peft.evaluation.scores import Score

_CHOSEN = ("vote", "confidence", "probe")  # ways that choose; final does not, and any block needs the gold answers


def tabulate_blocks(results: Results, plots: PlotsOf) -> Section:
    """Return accuracy after each block, for all methods with blocks, with details by number of steps."""
    scores = {method.name: _by_block(results, method.name) for method in results.having("blocks")}
    num_blocks = max(len(blocks) for blocks in scores.values())
    headings = [f"block {k + 1}" for k in range(num_blocks)]
    rows = []
    for method in results.having("blocks"):
        cells = [share_of(block.get("all")) for block in scores[method.name]]
        oracle = pool(part["any_block"] for part in results.parts(method.name, "blocks"))
        padding = [NONE] * (num_blocks - len(cells))
        rows.append((method.label, results.seeds(method.name, "blocks"), *cells, *padding, share_with_error(oracle)))
    columns = ("method", "seeds", *headings, "any block (oracle)")
    note = "Any block: some block's readout is right. No method can choose so, it needs the gold answer."
    table = Table("Right readouts after each block, all test rows", columns, rows, notes=(note,))
    detailed = results.detailed("blocks") if results.lengths else []
    by_length = [_blocks_by_length(results, method, scores[method.name]) for method in detailed]
    return Section("Readouts by block", (table, *beside(by_length, plots("blocks"))))


def _by_block(results: Results, name: str) -> list[dict[str, Score | None]]:
    parts = [part["by_block"] for part in results.parts(name, "blocks")]
    blocks = []
    for k in range(max(len(part) for part in parts)):
        column = [part[k] for part in parts if k < len(part)]
        blocks.append({"all": pool(entry.get("all") for entry in column), **pool_lengths(column)})
    return blocks


def _blocks_by_length(results: Results, method: Method, blocks: Sequence[Mapping[str, Score | None]]) -> Table:
    oracle = pool_lengths(part.get("any_block_by_length") for part in results.parts(method.name, "blocks"))
    rows = [
        (steps(length), *(share_of(block.get(length)) for block in blocks), share_of(oracle.get(length)))
        for length in results.lengths
    ]
    columns = ("chain", *(f"block {k + 1}" for k in range(len(blocks))), "any block (oracle)")
    return Table(f"{method.label}: right readouts by number of steps", columns, rows)


def tabulate_selection(results: Results) -> Section:
    """Return the answers chosen from all blocks without the gold answer, and how much of the gap this closes."""
    rows = []
    for method in results.having("selection"):
        pooled = {way: pool(part.get(way) for part in results.parts(method.name, "selection")) for way in WAYS}
        number = len(results.parts(method.name, "selection"))
        closed = [_gap_closed(pooled, way, num_seeds=number) for way in _CHOSEN]
        cells = [share_with_error(pooled[way]) for way in WAYS]
        seeds = results.seeds(method.name, "selection")
        rows.append((method.label, seeds, *cells, *(percent(value) for value in closed)))
    columns = ("method", "seeds", *_ways(), *(f"gap closed, {WAYS[way]}" for way in _CHOSEN))
    note = (
        "Gap closed: (way - final) / (any block - final), from the rows of all seeds together; below 0 a way loses "
        f"against the last block, {NONE} where the gap is below ten rows a seed."
    )
    tables = [Table("Accuracy of the chosen answer", columns, rows, notes=(note,))]
    for method in results.detailed("selection"):
        tables += _selection_by_length(results, method)
    return Section("Selection of one answer", tables)


def _ways() -> list[str]:
    words = {"any_block": "any block (oracle)", "final": "final block", "vote": "majority vote"}
    return [words.get(way, word) for way, word in WAYS.items()]


def _gap_closed(scores: Mapping[str, Score | None], way: str, *, num_seeds: int) -> float | None:
    final, oracle, chosen = scores["final"], scores["any_block"], scores[way]
    if final is None or oracle is None or chosen is None or oracle.num_correct - final.num_correct < 10 * num_seeds:
        return None
    return (chosen.accuracy - final.accuracy) / (oracle.accuracy - final.accuracy)


def _selection_by_length(results: Results, method: Method) -> list[Table]:
    parts = results.parts(method.name, "selection")
    found = {way: pool_lengths((part.get("by_length") or {}).get(way) for part in parts) for way in WAYS}
    rows = [
        (word, *(share_of(found[way].get(length)) for length in results.lengths))
        for (way, word) in zip(WAYS, _ways(), strict=True)
        if found[way]
    ]
    columns = ("way", *(steps(length) for length in results.lengths))
    return [Table(f"{method.label}: the chosen answer by number of steps", columns, rows)] if rows else []


def tabulate_probe(results: Results, plots: PlotsOf) -> Section:
    """Return the probe's AUROC by block."""
    methods = results.having("probe")
    found = {m.name: [part["auroc_by_block"] for part in results.parts(m.name, "probe")] for m in methods}
    num_blocks = max(len(part) for parts in found.values() for part in parts)
    rows = []
    for method in methods:
        cells = [_auroc([part[k] for part in found[method.name] if k < len(part)]) for k in range(num_blocks)]
        trained_on = mean(part.get("num_training_rows") for part in results.parts(method.name, "probe"))
        rows.append((method.label, results.seeds(method.name, "probe"), count(trained_on), *cells))
    columns = ("method", "seeds", "training rows", *(f"block {k + 1}" for k in range(num_blocks)))
    note = (
        "Area under the ROC curve of a linear probe that tells each block's right readouts from its wrong ones by the "
        "states of all blocks; it is trained on the selection rows. Mean over seeds, in brackets the lowest and the "
        f"highest; {NONE} where all readouts were right or all wrong."
    )
    table = Table("AUROC by block (0.5 is chance, 1 is perfect)", columns, rows, notes=(note,))
    return Section("Probe", (table, *plots("probe")))


def _auroc(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if len(there) < 2:
        return share(mean(there))
    return f"{share(mean(there))} ({share(min(there))}–{share(max(there))})"


def tabulate_budget(results: Results, plots: PlotsOf) -> Section:
    """Return accuracy and times of a trained adapter by number of blocks."""
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
    return Section("Budget", beside(tables, plots("budget")))


def tabulate_controls(results: Results, plots: PlotsOf) -> Section:
    """Return accuracy with disturbed blocks."""
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
    return Section("Controls", beside(tables, plots("controls")))


def _control_cells(
    results: Results, accuracy: Score | None, lengths: Mapping[str, Score], follows: Score | None
) -> list[str]:
    by_length = [share_of(lengths.get(length)) for length in results.lengths]
    return [share_with_interval(accuracy), share_with_interval(follows), *by_length]


def tabulate_faithfulness(results: Results) -> Section:
    """Return how often blocks state the right step, and whether wrong steps come with wrong answers."""
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
