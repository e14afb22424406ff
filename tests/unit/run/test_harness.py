"""Which runs the harness's model takes, and where it puts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rim_peft.recipe import load_recipe
from rim_peft.run import Run
from tests.conftest import build_rim

pytest.importorskip("lm_eval")

from rim_peft.run import harness

RECIPE = Path(__file__).parents[3] / "rim_peft" / "demo" / "recipe.yaml"


def load(monkeypatch: pytest.MonkeyPatch, run: Run, **options: Any) -> harness.RimLM:
    monkeypatch.setattr(harness, "load_run", lambda source, **_: run)
    return harness.RimLM("adapter", **options)


def test_a_method_with_blocks(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(build_rim(), tokenizer, load_recipe(RECIPE, check=False))
    assert load(monkeypatch, run).num_blocks == 2  # the adapter's, whatever the recipe says
    assert load(monkeypatch, run, num_blocks=0).block_ids == []
    info = load(monkeypatch, run, num_blocks=1).get_model_info()
    assert (info["rim_adapter"], info["rim_num_blocks"]) == ("adapter", 1)


def test_a_revision_reaches_the_download(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    asked: dict[str, Any] = {}
    run = Run(build_rim(), tokenizer)
    monkeypatch.setattr(harness, "load_run", lambda source, **options: asked.update(options) or run)
    harness.RimLM("owner/name", revision="v1")
    assert asked["revision"] == "v1"


def test_an_export_is_refused(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its tokenizer would put blocks behind contexts that get them from the harness's model too."""
    exported: Any = object()
    with pytest.raises(ValueError, match="adapter: must be an adapter, got an export, whose tokenizer"):
        load(monkeypatch, Run(build_rim(), tokenizer, exported=exported))


def test_methods_of_other_kinds(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=0)
    coconut = Run(model, tokenizer, load_recipe(RECIPE, ["method=coconut"], check=False))
    with pytest.raises(ValueError, match="method: must answer after blocks or at once, got 'coconut'"):
        load(monkeypatch, coconut)
    at_once = Run(model, tokenizer, load_recipe(RECIPE, ["method=answer"], check=False))
    assert load(monkeypatch, at_once).num_blocks == 0
    with pytest.raises(ValueError, match="num_blocks: must not be given for method 'answer', which has no blocks"):
        load(monkeypatch, at_once, num_blocks=2)


def test_several_processes(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes: must be one, which evaluates everything, got 2"):
        load(monkeypatch, Run(build_rim(), tokenizer))


@pytest.mark.parametrize(
    ("device", "has_gpu", "quantization", "moved_to"),
    [
        ("cuda:0", False, None, []),
        ("cuda:0", True, None, ["cuda:0"]),
        ("cpu", False, None, ["cpu"]),
        ("cpu", True, "nf4", []),
        (None, True, None, []),
    ],
)
def test_where_a_model_goes(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    device: str | None,
    has_gpu: bool,
    quantization: str | None,
    moved_to: list[str],
) -> None:
    moves: list[Any] = []
    model = build_rim()
    recipe = load_recipe(RECIPE, [f"model.quantization={quantization or 'null'}"], check=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(model, "to", moves.append)
    load(monkeypatch, Run(model, tokenizer, recipe), device=device)
    assert moves == moved_to
