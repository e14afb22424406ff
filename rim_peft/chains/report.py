"""What came of it: counts, lengths and cost, as data and as the folder's card."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rim_peft.chains.judging import REASONS, Verdict
from rim_peft.chains.options import ChainOptions
from rim_peft.chains.progress import Key, Noted
from rim_peft.escaping import code_span, fence, json_text, markdown
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run.rows import fingerprint
from rim_peft.version import __version__

Verdicts = Mapping[int, Mapping[int, Verdict]]
"""Verdicts by row and try."""


def make_report(
    examples: Mapping[int, Any],
    bad: Sequence[Any],
    verdicts: Verdicts,
    noted: Mapping[Key, Noted],
    rows: Sequence[Mapping[str, Any]],
    options: ChainOptions,
) -> dict[str, Any]:
    """Return the report.

    Args:
        examples: the good rows by index.
        bad: the bad rows.
        verdicts: verdicts on all drafts.
        noted: all drafts.
        rows: the rows of the output.
        options: how chains were sampled and chosen.
    """
    kept = [(row["row"], row["chain_try"]) for row in rows if row["chain_try"] is not None]
    with_chain = _solved(verdicts, upto=options.num_chains + options.hinted_tries)
    alone = _solved(verdicts, upto=options.num_chains)
    reasons = Counter(verdict.reason for found in verdicts.values() for verdict in found.values())
    drafts = [noted[row, number].draft for row, found in verdicts.items() for number in found]
    return {
        "source_rows": {
            "read": len(examples) + len(bad),
            "dropped_as_bad": len(bad),
            "with_steps_of_their_own": len(examples) - len(verdicts),
        },
        "questions": len(verdicts),
        "with_chain": with_chain,
        "with_chain_only_after_hint": with_chain - alone,
        "without_chain": len(verdicts) - with_chain,
        "share_with_chain": _share(with_chain, len(verdicts)),
        "by_try": [
            {
                "tries": number,
                "with_chain": (count := _solved(verdicts, upto=number)),
                "share": _share(count, len(verdicts)),
            }
            for number in range(1, options.num_chains + options.hinted_tries + 1)
        ],
        "drafts": {
            "written": len(drafts),
            "right": reasons[None],
            "kept": len(kept),
            "rejected": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        },
        "lengths_of_kept_chains": {
            "steps": _spread(len(row["steps"]) for row in rows if row["chain_try"] is not None),
            "characters": _spread(sum(map(len, row["steps"])) for row in rows if row["chain_try"] is not None),
            "tokens": _spread(noted[key].draft.num_tokens for key in kept),
        },
        "cost": {
            "prompt_tokens": sum(draft.num_prompt_tokens for draft in drafts),
            "written_tokens": sum(draft.num_tokens for draft in drafts),
            "seconds": round(sum(noted[row, number].seconds for row, found in verdicts.items() for number in found), 1),
        },
        "rows": fingerprint(rows),
    }


def _solved(verdicts: Verdicts, *, upto: int) -> int:
    """Count questions with a right chain among the first tries."""
    return sum(any(number <= upto and not v.reason for number, v in found.items()) for found in verdicts.values())


def _share(count: int, of: int) -> float | None:
    return round(count / of, 4) if of else None


def _spread(lengths: Iterable[int]) -> dict[str, float] | None:
    """Return shortest, median, mean and longest; None if there are none, or the server did not count tokens."""
    found = sorted(lengths)
    if not found or not found[-1]:
        return None
    return {
        "least": found[0],
        "median": statistics.median(found),
        "mean": round(statistics.fmean(found), 2),
        "most": found[-1],
    }


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report as lines for a terminal."""
    source, drafts, cost = report["source_rows"], report["drafts"], report["cost"]
    lines = [
        f"questions: {report['questions']}, with a chain: {report['with_chain']}"
        f"{_percent(report['share_with_chain'])}, without: {report['without_chain']} (kept without steps)",
    ]
    if report["with_chain_only_after_hint"]:
        lines.append(f"only after the answer was shown: {report['with_chain_only_after_hint']} (chain_from: hinted)")
    if source["with_steps_of_their_own"]:
        lines.append(f"rows that had steps: {source['with_steps_of_their_own']} (unchanged)")
    if source["dropped_as_bad"]:
        lines.append(f"bad rows dropped: {source['dropped_as_bad']} of {source['read']}")
    for one in report["by_try"]:
        tries = "1 try" if one["tries"] == 1 else f"{one['tries']} tries"
        lines.append(f"  within {tries}: {one['with_chain']}{_percent(one['share'])}")
    lines.append(f"chains: {drafts['written']} written, {drafts['right']} right, {drafts['kept']} kept")
    lines += [f"  rejected, {reason}: {count}" for reason, count in drafts["rejected"].items()]
    for name, spread in report["lengths_of_kept_chains"].items():
        if spread is not None:
            listed = ", ".join(f"{kind} {value:g}" for kind, value in spread.items())
            lines.append(f"{name} of a kept chain: {listed}")
    lines.append(
        f"cost: {cost['written_tokens']:,} tokens written after {cost['prompt_tokens']:,} of prompts, "
        f"{cost['seconds']:g} s"
    )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({100 * share:.1f} %)"


_COLUMNS = {
    "question": "as in the source",
    "steps": "the chain; null where no right one was found",
    "answer": "the source's answer",
    "chain_from": "`teacher`; `hinted`: the teacher was shown the answer; `given`: the source's own steps; null: none",
    "chain_try": "which try of the teacher it is; null for others",
    "row": "index of the source's row",
}

_SHOWN_APART = ("template", "hint_template", "examples")


def render_card(name: str, report: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the card of a folder of chains.

    Args:
        name: the folder's name.
        report: the report.
        settings: everything that the chains depend on.
    """
    metadata = write_yaml({"tags": ["synthetic"], "configs": [{"config_name": "default", "data_files": "train.jsonl"}]})
    options = "\n".join(
        f"| {markdown(key)} | {code_span(json_text(value), in_table=True)} |"
        for key, value in settings.items()
        if key not in _SHOWN_APART
    )
    columns = "\n".join(f"| `{column}` | {what} |" for column, what in _COLUMNS.items())
    parts = [
        f"---\n{metadata}---\n\n# {markdown(name)}",
        f"Questions with chains of thought that {code_span(str(settings['teacher']))} wrote, by `rim-peft chains` "
        f"(rim-peft {__version__}). A chain is kept if its answer is right by the answer rule; its steps are not "
        "checked. Chains whose `chain_from` is `hinted` were written with the answer in sight. Licences of the "
        "source and of the teacher apply.",
        "To train on it: `data.path=FOLDER`.",
        f"## Columns\n\n| | |\n|---|---|\n{columns}",
        f"## Report\n\n{fence(report_text(report), 'text')}\n\nThe same as data: `report.json`. All drafts, "
        "rejected ones too: `drafts.jsonl`.",
        f"## Options\n\n| | |\n|---|---|\n{options}",
        f"## Prompt\n\nEach question:\n\n{fence(settings['template'], 'text')}",
    ]
    if settings["hinted_tries"]:
        parts.append(f"The question once the answer is shown:\n\n{fence(settings['hint_template'], 'text')}")
    if settings["examples"]:
        shown = "\n".join(json_text(example) for example in settings["examples"])
        parts.append(f"Examples before each question:\n\n{fence(shown, 'json')}")
    return "\n\n".join(parts) + "\n"
