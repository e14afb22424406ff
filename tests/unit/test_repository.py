"""What surrounds a release: workflows, what is published, and what says which version it is."""

from __future__ import annotations

import re
import runpy
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rim_peft.tuner import card
from rim_peft.version import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
RELEASE = runpy.run_path(str(ROOT / ".ci" / "release.py"))


def read(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def steps(workflow: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def is_target(name: str) -> bool:
    return re.search(rf"^{re.escape(name)}:(?!=)", MAKEFILE, re.MULTILINE) is not None


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_make_runs(path: Path) -> None:
    """So that all of it can be run anywhere."""
    for step in steps(read(path)):
        assert ("run" in step) != ("uses" in step)
        for line in step.get("run", "").splitlines():
            program, target, *variables = re.sub(r"\$\{\{.*?\}\}", "X", line).split()
            assert program == "make"
            assert is_target(target), target
            for variable in variables:
                assert re.search(rf"^{variable.partition('=')[0]} *[?:]?=", MAKEFILE, re.MULTILINE), variable


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_do_no_more_than_it_must(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90
        assert set(job.get("permissions", {})) <= ({"id-token", "pages"} if name == "publish" else set())
        if name == "publish":  # what is trusted runs none of our code
            assert "environment" in job
            assert not any("run" in step for step in job["steps"])
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"(actions|pypa)/[\w-]+@v\d+(\.\d+\.\d+)?", step["uses"]), step["uses"]
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_all_pythons_and_both_ends_of_the_dependencies_are_tested() -> None:
    (tests,) = (read(path) for path in WORKFLOWS if path.stem == "tests")
    matrix = tests["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    for name in matrix["dependencies"]:
        assert (ROOT / f"constraints-{name}.txt").is_file()
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_issue_forms_are_complete() -> None:
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 2
    for path in forms:
        form = read(path)
        assert form["name"]
        assert form["description"]
        for field in form["body"]:
            assert field["type"] == "markdown" or field["id"], path


def test_the_citation_is_of_this_version_and_of_the_cards_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    text = Path(card.__file__).read_text(encoding="utf-8")
    assert f"title = {{{{{paper['title']}}}}}" in text
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in text
    assert " and ".join(author["family-names"] for author in paper["authors"]) in text


def write_wheel(folder: Path, *, without: str = "", more: str = "", licence: bytes | None = None) -> Path:
    """A wheel as setuptools makes it, or with a mistake."""
    info = f"rim_peft-{__version__}.dist-info"
    path = folder / f"rim_peft-{__version__}-py3-none-any.whl"
    names = {name for name in RELEASE["_committed"]() if name.startswith(RELEASE["CODE"])} - {without}
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names | ({more} if more else set()):
            wheel.writestr(name, "")
        wheel.writestr(f"{info}/METADATA", f"Name: rim-peft\nVersion: {__version__}\n")
        wheel.writestr(f"{info}/licenses/LICENSE", (ROOT / "LICENSE").read_bytes() if licence is None else licence)
    return path


def test_a_good_wheel_passes(tmp_path: Path) -> None:
    RELEASE["check_wheel"](write_wheel(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without": "rim_peft/demo/recipe.yaml"}, "missing: must be none, got rim_peft/demo/recipe.yaml"),
        ({"more": "rim_peft/demo/base/optimizer.pt"}, "not committed: must be none, got rim_peft/demo/base/optimizer"),
        ({"more": "tests/conftest.py"}, "not committed: must be none, got tests/conftest.py"),
        ({"licence": b""}, "must hold LICENSE"),
    ],
)
def test_a_wheel_with_a_mistake_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        RELEASE["check_wheel"](write_wheel(tmp_path, **change))


def test_a_source_distribution_with_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rim_peft.tar.gz"
    (tmp_path / "rows.jsonl").write_text("{}")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "rows.jsonl", "rim_peft-0.1.0/tests/rows.jsonl")
    with pytest.raises(SystemExit, match=r"unexpected files: must be none, got tests/rows\.jsonl"):
        RELEASE["check_source"](path)


def test_only_code_and_the_demo_are_committed_in_the_package() -> None:
    assert RELEASE["_foreign"](RELEASE["_committed"]()) == set()
    assert RELEASE["_foreign"]({"rim_peft/rows.jsonl", "rim_peft/tasks/x.safetensors", "rim_peft/a.py"}) == {
        "rim_peft/rows.jsonl",
        "rim_peft/tasks/x.safetensors",
    }


def test_a_tag_must_be_the_version_and_in_the_changelog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = RELEASE["check_tag"]
    check("refs/heads/main")
    with pytest.raises(SystemExit, match=rf"the tag must be v{re.escape(__version__)}.*v9\.9"):
        check("refs/tags/v9.9")
    monkeypatch.setitem(check.__globals__, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("## Unreleased\n")
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md must have a section"):
        check(f"refs/tags/v{__version__}")
    (tmp_path / "CHANGELOG.md").write_text(f"## {__version__} - 2026-12-01\n")
    check(f"refs/tags/v{__version__}")
