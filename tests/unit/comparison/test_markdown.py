"""The report as Markdown: every table's figures by hand, and what is missing is said."""

from __future__ import annotations

from typing import Any

import pytest

from rim_peft.comparison.report import render_markdown
from rim_peft.comparison.report.assembly import build_report
from rim_peft.comparison.report.content import Table
from tests.unit.comparison.results_document import ablate_document, bare_document, compare_document


def row(text: str, label: str, *, section: str) -> list[str]:
    """Cells of the first row with this label below a heading."""
    below = text.split(f"## {section}\n")[1].split("\n## ")[0]
    line = next(line for line in below.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


@pytest.fixture(scope="module")
def text() -> str:
    return render_markdown(compare_document())


def test_the_setting_has_command_rows_and_versions(text: str) -> None:
    assert text.startswith("# Comparison: demo\n")
    assert "```bash\nrim-peft compare recipes/compare/demo.yaml 'seeds=[0, 1]'\n```" in text
    assert "| test (all figures) | 0123456789abcdef | 1,000 |" in text
    assert "| versions | python 3.11.9, rim-peft 0.4.0, torch 2.13.0 |" in text
    assert "| seeds | 0, 1 |" in text
    assert '| LoRA, writing its steps out | cot | cot | samples | method=cot, data.step_separator=", " |' in text


def test_the_result_is_three_sentences_and_a_table(text: str) -> None:
    first, second, third, *_ = text.split("## Result\n\n")[1].split("\n\n")
    assert first == "“RiM” answers 0.994 (0.989–0.996) of 1,000 test questions right, 2 seeds together."
    best = "The best other method, “LoRA, writing its steps out”, answers 0.996 (0.992–0.998)"
    assert second == f"{best}, +0.003 ± 0.010 on the same rows (p 0.27)."
    times = "“RiM” takes 1.22× the time of answering at once, “LoRA, writing its steps out” 5.50×"
    assert third == f"To an answer, {times} (batch of 1, prompts of 32 tokens)."
    assert row(text, "RiM (reference)", section="Result") == ["0.994 (0.989–0.996)", "–", "1.22×"]
    assert row(text, "the base, answering at once", section="Result") == ["0.297 (0.269–0.326)", "-0.701 ± 0.010", "–"]


def test_a_result_without_times_and_pairs_says_so() -> None:
    text = render_markdown(bare_document(), questions="runs/rim a/questions.html").split("## Accuracy")[0]
    assert "“RiM” answers 0.998 (0.993–0.999) of 1,000 test questions right, with one seed." in text
    assert "Times were not compared." in text
    assert "](runs/rim%20a/questions.html)." in text


def test_the_main_table_pools_seeds_under_every_rule(text: str) -> None:
    # 998 and 989 of 1,000 rows: 1987 / 2000, standard error sqrt(0.9935 * 0.0065 / 2000) = 0.0018.
    assert row(text, "RiM (reference)", section="Accuracy") == [
        "samples",
        "2",
        "24,320",
        "1,234,567",
        "98,304",
        "0.994 ± 0.002 (0.989–0.996)",
        "0.996 ± 0.001",
        "0.006",
    ]
    assert row(text, "the base, answering at once", section="Accuracy")[:5] == ["–", "1", "–", "–", "–"]
    assert row(text, "LoRA, answering at once (same compute)", section="Accuracy")[0] == "compute"


def test_accuracy_by_length_has_interval_and_spread(text: str) -> None:
    table = text.split("**Accuracy by number of reasoning steps**")[1]
    assert "| method | 1 step | 2 steps | 3 steps | 4 steps |" in table
    # 248 and 240 of 250.
    assert "0.976 (0.959–0.986), 0.023 |" in table


def test_pairs_are_method_less_reference_whatever_the_sign_in_the_document(text: str) -> None:
    cells = row(text, "LoRA, answering at once", section="Paired differences")
    assert cells == ["0", "1,000", "-0.365 ± 0.010", "4", "369", "\\< 0.001"]
    assert row(text, "LoRA, writing its steps out", section="Paired differences")[1:3] == ["2,000", "+0.003 ± 0.010"]


def test_blocks_selection_and_gap_closed(text: str) -> None:
    assert row(text, "RiM", section="Readouts by block") == [
        "0, 1",
        "0.410",
        "0.598",
        "0.785",
        "0.998",
        "0.999 ± 0.001",
    ]
    assert row(text, "3 steps", section="Readouts by block") == ["0.232", "0.120", "0.980", "1.000", "1.000"]
    # Final 0.980, any block 1.000: vote 0.990 closes half of the gap, confidence 0.985 a quarter, the probe 0.998 most.
    assert row(text, "RiM", section="Selection of one answer")[-3:] == ["50 %", "25 %", "90 %"]


def test_no_gap_is_no_share_of_it() -> None:
    document = compare_document()
    for run in document["runs"]:
        if run["selection"]:
            run["selection"]["any_block"] = run["selection"]["final"]
    assert row(render_markdown(document), "RiM", section="Selection of one answer")[-3:] == ["–"] * 3


def test_probe_budget_controls_and_faithfulness(text: str) -> None:
    assert row(text, "RiM", section="Probe")[:3] == ["0, 1", "1,000", "0.810 (0.810–0.810)"]
    assert row(text, "RiM", section="Probe")[-1] == "–"
    assert row(text, "4", section="Budget")[:3] == ["0.995 ± 0.002 (0.991–0.997)", "10.4", "15.5"]
    assert row(text, "swapped", section="Controls")[2] == "0.930 ± 0.006 (0.918–0.940)"
    assert row(text, "nothing disturbed", section="Controls")[1] == "0.994 ± 0.002 (0.989–0.996)"
    assert row(text, "answer right if a step is wrong", section="Faithfulness") == ["0.300 ± 0.102 (0.145–0.519)", "20"]


def test_latency_has_units_and_ratios(text: str) -> None:
    cells = row(text, "LoRA, writing its steps out", section="Latency")
    assert cells == ["1", "32", "69.7", "8.10×", "74.2", "5.50×", "15.0", "–"]
    assert "first token (ms) | first token, ratio | answer (ms)" in text
    assert row(text, "over blocks", section="Representations") == ["100", "43 %", "21 %"]


def test_what_some_methods_lack_is_said(text: str) -> None:
    assert "* Controls: not measured of RiM without stage 1." not in text  # as many lack it as have it
    assert "* Controls: measured only of RiM." in text
    assert "Readouts by block and any-block" not in text  # all have it


def test_what_was_not_measured_is_said_and_has_no_section() -> None:
    text = render_markdown(bare_document())
    missing = text.split("## Not measured\n\n")[1].split("\n\n")[0].splitlines()
    assert missing == [
        "* Readouts by block and any-block accuracy: not measured.",
        "* Selection of one answer: not measured.",
        "* The probe: not measured.",
        "* The budget of blocks: not measured.",
        "* Controls: not measured.",
        "* Faithfulness: not measured.",
        "* Accuracy by number of steps: not measured, the rows have no steps.",
        "* Paired differences: not measured.",
        "* Latency: not measured.",
        "* Principal components of the states over blocks: not measured.",
        "* Principal components of the states over training: not measured.",
    ]
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Result", "Accuracy", "Not measured", "Runs", "What was compared"]
    assert "No rows are recorded for selection (searched values, probe)." in text


def test_an_ablation_has_one_table_for_each_key_with_the_reference_on_top() -> None:
    text = render_markdown(ablate_document())
    assert text.startswith("# Ablation: demo-grid\n")
    section = text.split("## Changed: rim.layer\n")[1].split("\n## ")[0]
    labels = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    assert labels == ["| rim.layer", "| as shared (reference)", "| first", "| middle", "| null"]
    # 250 + 180 + 60 + 55 of 1,000; 30 rows only the reference had right, 10 only the variant.
    cells = row(text, "null", section="Changed: rim.layer")
    assert cells[1] == "0.545 ± 0.016 (0.514–0.576)"
    assert cells[4:] == ["-0.020 ± 0.010", "0.27", "1.000", "0.720", "0.240", "0.220"]


def test_the_value_of_the_reference_is_shown_where_it_is_known() -> None:
    document = ablate_document()
    document["methods"][0]["changes"] = {"rim.layer": "last"}
    assert row(render_markdown(document), "last (reference)", section="Changed: rim.layer")[0] == "1"


@pytest.mark.parametrize("make", [compare_document, ablate_document, bare_document])
def test_every_table_has_as_many_cells_as_columns(make: Any) -> None:
    lines = render_markdown(make()).splitlines()
    for place, line in enumerate(lines):
        if line.startswith("|---"):
            width = line.count("|")
            assert lines[place - 1].replace("\\|", "").count("|") == width
            assert lines[place + 1].replace("\\|", "").count("|") == width


def test_names_cannot_break_tables_or_become_html() -> None:
    document = compare_document()
    document["methods"][-1]["label"] = "a|b\n<script>alert(1)</script> [x](http://y)"
    document["command"] = ["rim-peft", "```\n# heading"]
    text = render_markdown(document)
    assert "a\\|b \\<script\\>alert(1)\\</script\\> \\[x\\](http://y) (reference)" in text
    assert "<script>" not in text
    assert "````bash\nrim-peft '```\n# heading'\n````" in text


def test_a_table_with_a_short_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: must have 2 cells, got \['a'\]"):
        Table("t", ("x", "y"), (("a",),))


def test_the_report_leaves_the_document_as_it_is() -> None:
    document = compare_document()
    build_report(document, [])
    assert document == compare_document()
