"""A results document with all its parts, as ``rim-peft compare`` writes it: figures made up, arithmetic right."""

from __future__ import annotations

import json
import math
from typing import Any

from rim_peft.evaluation.scores import Score

LENGTHS = ("1", "2", "3", "4")
NUM_ROWS = 250  # of each length
NUM_BLOCKS = 4

RIGHT = {  # right answers of 250 by number of steps, for seeds 0 and 1
    "base": [(250, 12, 20, 15), None],
    "answer": [(250, 246, 61, 76), (250, 250, 68, 70)],
    "answer-compute": [(250, 250, 80, 72), (250, 250, 70, 74)],
    "pause": [(250, 248, 62, 58), (250, 250, 60, 60)],
    "cot": [(250, 250, 249, 247), (250, 250, 250, 246)],
    "rim-no-grounding": [(250, 247, 63, 57), (250, 249, 66, 61)],
    "rim": [(250, 250, 250, 248), (250, 250, 249, 240)],
}
BY_BLOCK = [(230, 60, 58, 62), (250, 250, 30, 68), (250, 250, 245, 40), (250, 250, 250, 248)]


def score(num_correct: int, num_rows: int) -> dict[str, Any]:
    found = Score(num_correct, num_rows)
    low, high = found.interval
    return {**found.to_dict(), "low": round(low, 6), "high": round(high, 6)}


def by_length(counts: tuple[int, ...]) -> dict[str, Any]:
    return {length: score(count, NUM_ROWS) for length, count in zip(LENGTHS, counts, strict=True)}


def compare_document() -> dict[str, Any]:
    runs = [
        run(name, seed, counts)
        for name, seeds in RIGHT.items()
        for seed, counts in enumerate(seeds)
        if counts is not None
    ]
    document = {
        "format": 1,
        "name": "demo",
        "kind": "compare",
        "command": ["rim-peft", "compare", "recipes/compare/demo.yaml", "seeds=[0, 1]"],
        "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T04:19:05Z",
        "versions": {"python": "3.11.9", "rim-peft": "0.4.0", "torch": "2.13.0"},
        "hardware": {"platform": "Linux", "cpu": "x86_64", "cpu_cores": 2, "torch_threads": 2},
        "task": {
            "name": "potions",
            "options": {"lengths": [1, 2, 3, 4]},
            "answer_rules": ["exact-text", "last-word"],
            "answer_rule": "exact-text",
        },
        "data": {
            "train": {"num_rows": 24320, "sha256": "a" * 64},
            "selection": {"num_rows": 1000, "sha256": "b" * 64},
            "test": {"num_rows": 1000, "sha256": "0123456789abcdef" * 4},
        },
        "base": {"name": "rim_peft/demo/base", "parameters": 752_128},
        "reference": "rim",
        "methods": [
            method("base", "the base, answering at once", "base"),
            method("answer", "LoRA, answering at once", "answer", {"method": "answer"}),
            method("answer-compute", "LoRA, answering at once", "answer", {"method": "answer"}, view="compute"),
            method("pause", "pause tokens", "pause", {"method": "pause"}),
            method("cot", "LoRA, writing its steps out", "cot", {"method": "cot", "data.step_separator": ", "}),
            method("rim-no-grounding", "RiM without stage 1", "rim", {"grounding": None}),
            method("rim", "RiM", "rim"),
        ],
        "runs": runs,
        "summary": [summary(name, seeds) for name, seeds in RIGHT.items()],
        "pairs": [
            pair("answer", 0, 1000, 369, 4),
            pair("answer", 1, 1000, 357, 6),
            pair("answer", "all", 2000, 726, 10),
            pair("cot", "all", 2000, 4, 9),
            pair("base", 0, 1000, 701, 0),
        ],
        "latency": latency(),
        "representations": representations(),
    }
    return json.loads(json.dumps(document))  # no object shared, as after reading a file


def method(
    name: str, label: str, kind: str, changes: dict[str, Any] | None = None, view: str = "samples"
) -> dict[str, Any]:
    return {"name": name, "label": label, "method": kind, "view": view, "changes": changes or {}}


def run(name: str, seed: int, counts: tuple[int, ...]) -> dict[str, Any]:
    right = sum(counts)
    training = {"num_samples": 24320, "num_tokens": 1_234_567, "seconds": 160.4, "trainable_parameters": 98_304}
    found: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "folder": f"outputs/compare-demo/runs/{name}/seed-{seed}",
        "recipe_sha256": f"{seed}123456789abcdef" * 4,
        "training": None if name == "base" else training,
        "accuracy": {"exact-text": score(right, 1000), "last-word": score(min(1000, right + 2), 1000)},
        "by_length": by_length(counts),
        **dict.fromkeys(("blocks", "selection", "probe", "budget", "controls", "faithfulness")),
    }
    if name in ("rim", "rim-no-grounding"):
        found["blocks"] = {
            "by_block": [{"all": score(sum(block), 1000), **by_length(block)} for block in BY_BLOCK],
            "any_block": score(999, 1000),
            "any_block_by_length": by_length((250, 250, 250, 249)),
        }
    if name == "rim":
        found.update(looked_into(right))
    return found


def looked_into(right: int) -> dict[str, Any]:
    """What is measured of the reference alone."""
    ways = {"vote": 990, "confidence": 985, "probe": 998}
    shares = {"final": (250, 250, 250, 248), "vote": (250, 250, 245, 245), "any_block": (250, 250, 250, 249)}
    return {
        "selection": {
            "final": score(980, 1000),
            **{way: score(count, 1000) for way, count in ways.items()},
            "any_block": score(1000, 1000),
            "gap_closed": {"vote": 0.5, "confidence": 0.25, "probe": 0.9},
            "by_length": {way: by_length(counts) for way, counts in shares.items()},
        },
        "probe": {"auroc_by_block": [0.81, 0.86, 0.9 + right / 1e5, None], "num_training_rows": 1000},
        "budget": [
            {
                "num_blocks": blocks,
                "accuracy": score(count, 1000),
                "by_length": by_length((250, count // 4, count // 4, count // 5)),
                "first_token_ms": 8.6 + 0.45 * blocks,
                "answer_ms": 13.5 + 0.5 * blocks,
            }
            for blocks, count in ((0, 290), (1, 410), (2, 600), (4, 995), (8, 860), (16, 420))
        ],
        "controls": [
            control("removed", "no blocks at all", 297),
            control("shuffled", "memory rows in other places", 702),
            control("swapped", "states of another question's blocks", 255, follows=930),
            control("random", "random memory rows", 301),
        ],
        "faithfulness": {
            "stage": "grounding",
            "by_block": [{"block": k, "step_right": score(750 - 250 * k + 245, 1000 - 250 * k)} for k in (1, 2, 3)],
            "answer_right_if_steps_right": score(735, 740),
            "answer_right_if_a_step_wrong": score(3, 10),
        },
    }


def control(name: str, description: str, count: int, follows: int | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "description": description,
        "accuracy": score(count, 1000),
        "by_length": by_length((count // 4,) * 4),
        "follows": None if follows is None else score(follows, 1000),
    }


def summary(name: str, seeds: list[Any]) -> dict[str, Any]:
    there = [counts for counts in seeds if counts is not None]

    def pooled(totals: list[int], num_rows: int) -> dict[str, Any]:
        found = score(sum(totals), num_rows * len(totals))
        shares = [total / num_rows for total in totals]
        center = sum(shares) / len(shares)
        variance = sum((share - center) ** 2 for share in shares) / max(1, len(shares) - 1)
        deviation = math.sqrt(variance) if len(shares) > 1 else None
        return {**{key: found[key] for key in ("accuracy", "low", "high")}, "seed_std": deviation}

    return {
        "name": name,
        "num_seeds": len(there),
        **pooled([sum(counts) for counts in there], 1000),
        "by_length": {
            length: pooled([counts[place] for counts in there], NUM_ROWS) for place, length in enumerate(LENGTHS)
        },
    }


def pair(name: str, seed: int | str, num_rows: int, only_reference: int, only_other: int) -> dict[str, Any]:
    return {
        "name": name,
        "reference": "rim",
        "seed": seed,
        "num_rows": num_rows,
        "difference": (only_reference - only_other) / num_rows,
        "standard_error": 0.0101,
        "only_reference": only_reference,
        "only_other": only_other,
        "p_value": 1e-40 if only_reference > 100 else 0.267,
    }


def latency() -> list[dict[str, Any]]:
    ways = {"answer": (1.0, 1.0, 2.0), "rim": (1.21, 1.22, 2.0), "cot": (8.1, 5.5, 15.0)}
    return [
        {
            "name": name,
            "batch_size": batch,
            "prompt_tokens": prompt,
            "first_token_ms": 8.6 * scale * first,
            "answer_ms": 13.5 * scale * whole,
            "num_tokens": tokens,
            "peak_memory_mb": None if batch == 1 else 1234.5,
            "first_token_ratio": first,
            "answer_ratio": whole,
        }
        for batch, prompt, scale in ((1, 32, 1.0), (1, 256, 1.9), (32, 32, 4.2))
        for name, (first, whole, tokens) in ways.items()
    ]


def representations() -> dict[str, Any]:
    points = [
        {
            "block": block,
            "length": 1 + row % 4,
            "right": (row + block) % 5 > 0,
            "x": round(3 * math.cos(block) + 0.8 * math.sin(7.0 * row), 4),
            "y": round(3 * math.sin(block) + 0.8 * math.cos(3.0 * row), 4),
        }
        for row in range(25)
        for block in range(1, NUM_BLOCKS + 1)
    ]
    training = [
        {
            "step": step,
            "stage": stage,
            "block": block,
            "x": round(step / 100 * math.cos(block) + 0.02 * row, 4),
            "y": round(step / 100 * math.sin(block) + 0.02 * row, 4),
        }
        for stage, step in (*(("grounding", step) for step in range(50, 301, 50)), ("refinement", 80))
        for row in range(3)
        for block in range(1, NUM_BLOCKS + 1)
    ]
    return {
        "blocks": {"explained_variance": [0.43, 0.21], "points": points},
        "training": {"explained_variance": [0.5, 0.12], "points": training},
    }


def bare_document() -> dict[str, Any]:
    """A document of which nothing but answers was measured, one seed, rows without steps."""
    document = compare_document()
    document["runs"] = [found for found in document["runs"] if found["seed"] == 0]
    for found in document["runs"]:
        found.update(dict.fromkeys(("blocks", "selection", "probe", "budget", "controls", "faithfulness")))
        found["by_length"] = {}
    for entry in document["summary"]:
        entry.update(num_seeds=1, seed_std=None, by_length={})
    document.update(pairs=[], latency=[], representations=None)
    del document["data"]["selection"]
    return document


def ablate_document() -> dict[str, Any]:
    """One recipe with one value changed at a time: numbers, numbers over decades, and words."""
    document = compare_document()
    grid: dict[str, list[tuple[Any, tuple[int, ...]]]] = {
        "refinement.num_blocks": [(2, (250, 240, 60, 50)), (8, (250, 250, 250, 249)), (4, (250, 250, 250, 248))],
        "grounding.learning_rate": [(1e-4, (250, 60, 50, 55)), (1e-3, (250, 250, 100, 60)), (1e-2, (240, 90, 60, 70))],
        "rim.layer": [("first", (250, 250, 250, 248)), ("middle", (250, 250, 249, 200)), (None, (250, 180, 60, 55))],
    }
    entries = {f"{key}={value}": (key, value, counts) for key, values in grid.items() for value, counts in values}
    document["kind"] = "ablate"
    document["name"] = "demo-grid"
    document["methods"] = [method("rim", "RiM", "rim")] + [
        method(name, f"{key}: {value}", "rim", {key: value}) for name, (key, value, _) in entries.items()
    ]
    document["runs"] = [found for found in document["runs"] if found["name"] == "rim" and found["seed"] == 0] + [
        run(name, 0, counts) for name, (_, _, counts) in entries.items()
    ]
    document["summary"] = [summary("rim", [RIGHT["rim"][0]])] + [
        summary(name, [counts]) for name, (_, _, counts) in entries.items()
    ]
    document["pairs"] = [pair(name, 0, 1000, 30, 10) for name in entries]
    return json.loads(json.dumps(document))
