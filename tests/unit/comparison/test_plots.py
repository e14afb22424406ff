"""Plots: which there are, the same bytes every time, well-formed, and no trace in matplotlib's settings."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from rim_peft.comparison.plots import draw_plots, require_matplotlib
from rim_peft.comparison.plots.answers import draw_ablations, draw_accuracy, draw_latency, draw_lengths
from rim_peft.comparison.plots.blocks import draw_blocks, draw_budget, draw_controls, draw_probe, draw_states
from rim_peft.comparison.plots.style import look, plain, plot_style, shades
from rim_peft.comparison.report import render_markdown, rewrite_report, write_report
from rim_peft.comparison.results import Results
from rim_peft.escaping import json_text
from tests.unit.comparison.results_document import ablate_document, bare_document, compare_document

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def draw(function: Any, document: dict[str, Any]) -> Any:
    with plot_style():
        return function(Results(document))


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    first, second = (draw_plots(bare_document(), tmp_path / name) for name in ("a", "b"))
    assert [plot.name for plot in first] == ["accuracy"]
    for one, two in zip(first, second, strict=True):
        assert one.png.read_bytes() == two.png.read_bytes()
        assert one.svg.read_bytes() == two.svg.read_bytes()
        assert one.png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_report_has_every_plot_and_does_not_change_when_it_is_written_again(tmp_path: Path) -> None:
    document = compare_document()
    write_report(document, tmp_path)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    plots = ["accuracy", "accuracy-by-length", "blocks-1", "blocks-2", "probe", "budget", "controls-1", "latency"]
    plots += ["states-by-block", "states-over-training"]
    assert names == {f"{name}.{ending}" for name in plots for ending in ("png", "svg")}
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))}
    for path in (tmp_path / "plots").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
        assert f"(plots/{path.stem}.svg)" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "results.html").read_text(encoding="utf-8").count("data:image/svg+xml") == len(plots)
    write_report(document, tmp_path)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))} == before


def test_users_settings_neither_matter_nor_change() -> None:
    with matplotlib.rc_context({"font.size": 30.0, "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        with plot_style():
            assert matplotlib.rcParams["font.size"] == 10.5
        assert dict(matplotlib.rcParams) == before


def test_accuracy_is_drawn_with_its_interval() -> None:
    (drawing,) = draw(draw_accuracy, compare_document())
    (axes,) = drawing.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "RiM"
    assert axes.get_xlabel() == "accuracy (share of right answers)"
    assert [text.get_text() for text in axes.texts] == ["0.297", "0.635", "0.648", "0.619", "0.996", "0.622", "0.994"]
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert [round(x, 3) for x, _ in bar] == [0.269, 0.326]  # the base: 297 of 1,000


def test_methods_with_equal_compute_have_their_own_panel_with_the_reference() -> None:
    (drawing,) = draw(draw_lengths, compare_document())
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in drawing.figure.axes]
    assert len(labels[0]) == 6
    assert labels[1] == ["LoRA, answering at once (same compute)", "RiM"]


def test_blocks_are_drawn_by_length_and_beside_them_what_was_chosen() -> None:
    without, with_selection = draw(draw_blocks, compare_document())
    left, right = with_selection.figure.axes
    three_steps = left.containers[2].lines[0]
    assert list(three_steps.get_ydata()) == [0.232, 0.12, 0.98, 1.0]
    assert [label for _, label in zip(*left.get_legend_handles_labels(), strict=True)][2:] == [
        "3 steps",
        "4 steps",
        "all rows",
    ]
    ticks = [label.get_text() for label in right.get_xticklabels()]
    assert ticks == ["final", "vote", "confidence", "probe", "any block"]
    assert [label.get_text() for label in without.figure.axes[1].get_xticklabels()] == ["any block"]


def test_budget_controls_probe_and_latency_name_their_units() -> None:
    (budget,) = draw(draw_budget, compare_document())
    assert [axes.get_ylabel() for axes in budget.figure.axes] == ["accuracy (share)", "time to first token (ms)"]
    (controls,) = draw(draw_controls, compare_document())
    ticks = [label.get_text() for label in controls.figure.axes[0].get_yticklabels()]
    assert ticks == ["removed", "shuffled", "swapped", "random"]
    (probe,) = draw(draw_probe, compare_document())
    assert probe.figure.axes[0].get_ylabel() == "AUROC (1 = perfect, 0.5 = chance)"
    (latency,) = draw(draw_latency, compare_document())
    assert [axes.get_xlabel() for axes in latency.figure.axes[-2:]] == [
        "time to first token (ms)",
        "time to whole answer (ms)",
    ]
    assert [text.get_text() for text in latency.figure.axes[0].texts] == ["1.00×", "1.21×", "8.10×"]


def test_states_have_their_share_of_variance_on_the_axes() -> None:
    by_block, over_training = draw(draw_states, compare_document())
    assert by_block.figure.axes[0].get_xlabel() == "principal component 1 (43 % of the variance)"
    assert "from step 50 of grounding (hollow) to step 80 of refinement" in over_training.caption


def test_an_ablation_has_one_plot_for_each_key_numeric_where_it_is_numbers() -> None:
    blocks, rate, layer = draw(draw_ablations, ablate_document())
    assert blocks.title == "Accuracy by refinement.num_blocks"
    assert list(blocks.figure.axes[0].get_xticks()) == [2.0, 4.0, 8.0]  # sorted, at their values
    assert [label.get_text() for label in blocks.figure.axes[0].get_xticklabels()] == ["2", "4", "8"]
    assert list(rate.figure.axes[0].get_xticks()) == [0, 1, 2]  # over decades: by order
    assert [label.get_text() for label in layer.figure.axes[0].get_xticklabels()] == ["first", "middle", "null"]
    legend = [text.get_text() for text in layer.figure.axes[0].get_legend().get_texts()]
    assert set(legend) == {"1 step", "2 steps", "3 steps", "4 steps", "all rows", "shared setting"}


def test_what_is_not_there_is_not_drawn() -> None:
    document = bare_document()
    for function in (draw_lengths, draw_blocks, draw_probe, draw_budget, draw_controls, draw_latency, draw_states):
        assert draw(function, document) == []


def test_looks_differ_in_colour_and_marker() -> None:
    found = {(look(index).color, look(index).marker) for index in range(63)}
    assert len(found) == 63
    assert len({shade.color for shade in shades(8)}) == 8


def test_labels_are_no_formulas() -> None:
    assert plain("costs $x$\nmore") == r"costs \$x\$ more"
    assert plain("a" * 60, limit=10) == "aaaaaaaaa…"


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots: need matplotlib.*pip install 'rim-peft\[compare\]'"):
        require_matplotlib()
    with pytest.raises(ImportError, match=r"rim-peft\[compare\]"):
        write_report(compare_document(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_report_is_written_again_from_its_document_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json_text(bare_document()), encoding="utf-8")
    page = tmp_path / "runs" / "rim" / "seed-0" / "questions.html"
    assert rewrite_report(tmp_path) == bare_document()
    before = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert before == render_markdown(bare_document(), draw_plots(bare_document(), tmp_path / "plots"))
    page.parent.mkdir(parents=True)
    page.write_text("")
    rewrite_report(tmp_path)
    assert "runs/rim/seed-0/questions.html" in (tmp_path / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"methods": None}, "must be what rim-peft compare wrote"),
        ({"runs": [{}]}, "must be what rim-peft compare wrote"),
        ({"base": []}, "must be what rim-peft compare wrote"),
    ],
)
def test_a_damaged_document_replaces_nothing(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    (tmp_path / "results.json").write_text(json_text({**bare_document(), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        rewrite_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/results.json")))
def test_the_reports_in_the_repository_are_those_of_their_documents(folder: str) -> None:
    document = json.loads((RESULTS / folder / "results.json").read_text(encoding="utf-8"))
    text = (RESULTS / folder / "results.md").read_text(encoding="utf-8")
    pictures = sorted(re.findall(r"\]\(plots/([a-z0-9-]+\.svg)\)", text))
    assert pictures == sorted(path.name for path in (RESULTS / folder / "plots").glob("*.svg"))
    # Drawing them takes a minute, so the rest is compared with a report without any.
    text = re.sub(r"(?s)## Plots\n.*?(?=## What was compared)", "", text)
    own, new = (
        [line for line in found.splitlines() if line.startswith(("#", "|", "*"))]
        for found in (text, render_markdown(document))
    )
    assert own == new
