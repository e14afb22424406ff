"""The notebooks run at a tiny size, and are committed without outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_peft.demo import BASE, RECIPE, showcase

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SHORT = [
    *("grounding.max_steps=2", "refinement.max_steps=2", "data.validation_rows=8"),
    *("grounding.per_device_train_batch_size=4", "refinement.per_device_train_batch_size=4"),
    *("grounding.logging_steps=1", "refinement.logging_steps=1"),
]
LEFT_OUT = {
    "needs-network": "installs the package",
    "needs-server": "needs vLLM and a server (make test-engines tests what it shows)",
}
"""Tags of cells that are not run, with the reason."""


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


def start(folder: Path) -> str:
    return "NUM_ROWS, BATCH_SIZE, GROUNDING_STEPS, REFINEMENT_STEPS, NUM_TEST_ROWS = 32, 4, 3, 2, 6"


def own_data(folder: Path) -> str:
    return f"OPTIONS += {SHORT}\nNUM_ROWS, NUM_TEST_ROWS = 40, 6"


def qlora(folder: Path) -> str:
    pytest.importorskip("bitsandbytes")
    options = [*SHORT, f"model.name_or_path={BASE}", "model.quantization=nf4", "data.options.num_rows=16"]
    options.append(f"output_dir={folder / 'out'}")
    return f"RECIPE, OPTIONS, NUM_TEST_ROWS = {str(RECIPE)!r}, {options}, 4"


def serve_vllm(folder: Path) -> str:
    base = AutoModelForCausalLM.from_pretrained(BASE)
    base.resize_token_embeddings(base.config.vocab_size + 3)  # spare ids beyond the tokenizer
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "base")
    overrides = [*SHORT, "data.options.num_rows=16", f"model.name_or_path={folder / 'base'}"]
    showcase.train_demo(folder / "run", seed=0, overrides=overrides, command=[])
    question = "Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?"
    return f"ADAPTER, QUESTIONS, NUM_TRIES = {str(folder / 'run')!r}, [{question!r}], 1"


TINY: dict[str, Callable[[Path], str]] = {
    "start": start,
    "own-data": own_data,
    "qlora": qlora,
    "serve-vllm": serve_vllm,
}
"""For a notebook: makes files, and returns what its cell of parameters is followed by."""


def test_there_is_a_size_for_each() -> None:
    assert sorted(TINY) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stripped_and_says_what_may_be_changed(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    before = ""
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert tags(cell) <= {"parameters", *LEFT_OUT}
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
        if "needs-server" in tags(cell):
            assert "(needs a server)" in before
        before = cell.source
    (place,) = [place for place, cell in enumerate(notebook.cells) if "parameters" in tags(cell)]
    assert notebook.cells[place - 1].source.startswith("**Parameters.**")
    assert any("plt.show()" in cell.source for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = read(name)
    tiny = nbformat.v4.new_code_cell(TINY[name](tmp_path))
    (place,) = [place for place, cell in enumerate(notebook.cells) if "parameters" in tags(cell)]
    notebook.cells.insert(place + 1, tiny)
    left_out = [cell for cell in notebook.cells if tags(cell) & set(LEFT_OUT)]
    notebook.cells = [cell for cell in notebook.cells if cell not in left_out]
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == sum("plt.show()" in cell.source for cell in notebook.cells)
