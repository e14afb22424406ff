"""Build what a release publishes, check it, and try the wheel in an environment of its own.

``python .ci/release.py check`` does all of it but the demo's training, which ``python .ci/release.py demo`` runs with
the wheel that was installed. Files are built from what is committed. Needs git and Python alone.
"""

from __future__ import annotations

import email.parser
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from threading import Timer
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "release"
INSTALLED = WORK / "installed"
EMPTY = WORK / "empty"
TOOLS = ("build==1.6.1", "twine==7.0.0")
VERSION = str(runpy.run_path(str(ROOT / "rim_peft" / "version.py"))["__version__"])

CODE = ("rim_peft/", "rim_peft_command.py", "rim_peft_vllm.py")
SOURCE = (*CODE, "recipes/", "rim_peft.egg-info/")
SOURCE_FILES = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
NOT_CODE = re.compile(
    r"rim_peft/(?:py\.typed|demo/(?:recipe\.yaml|results\.json|base/[a-z_]+\.(?:json|safetensors)"
    r"|smollm2/(?:README\.md|recipe\.yaml|[a-z_]+\.(?:json|safetensors))))"
)
"""The package's files that are no Python: the demo with its base and the trained adapter, the only weights."""
SHORT = (
    *("--num-rows=2", "grounding.max_steps=2", "refinement.max_steps=2", "data.validation_rows=8"),
    *("grounding.per_device_train_batch_size=4", "refinement.per_device_train_batch_size=4"),
    "data.options.num_rows=16",
)
"""A demo of two steps."""
QUESTION = "Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?"
ASK = "import sys, gradio_client as g; print(g.Client(sys.argv[1]).predict(sys.argv[2], 4, False, api_name='/ask'))"


def main(arguments: list[str]) -> int:
    """Check a release, or run the demo with the wheel that was checked."""
    if arguments == ["check"]:
        wheel, source = build(export())
        check_wheel(wheel)
        check_source(source)
        check_tag(os.environ.get("GITHUB_REF", ""))
        venv.create(INSTALLED, with_pip=True, clear=True)
        install(str(wheel))
        try_wheel()
        install(f"{wheel}[app]")
        try_app()
        print(f"release: {wheel.name} and {source.name} are ready; left to run: make release-demo")
        return 0
    if arguments == ["demo"]:
        if not INSTALLED.is_dir():
            raise SystemExit("release: the wheel must be installed for the demo. Run make release-check first.")
        run("rim-peft", "demo", "--output-dir", "demo")
        return 0
    raise SystemExit(f"usage: release.py check | demo, got {' '.join(arguments)!r}")


def export() -> Path:
    """Write what is committed to an empty folder, so that no file that lies around gets into a release."""
    folder = WORK / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = WORK / "source.tar"
    subprocess.run(["git", "archive", "--output", str(archive), "HEAD"], cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(folder)], check=True)
    archive.unlink()
    return folder


def build(source: Path) -> tuple[Path, Path]:
    """Build the source distribution and, from it, the wheel; check that an index can show the README."""
    tools = WORK / "tools"
    venv.create(tools, with_pip=True, clear=True)
    python = str(tools / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS], check=True)
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([python, "-m", "build", "--outdir", str(DIST), str(source)], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = DIST.glob("*.whl")
    (archive,) = DIST.glob("*.tar.gz")
    subprocess.run([python, "-m", "twine", "check", "--strict", str(wheel), str(archive)], check=True)
    return wheel, archive


def check_wheel(path: Path) -> None:
    """Check that a wheel holds the committed files of the package and nothing else, its licence and its metadata."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.parser.Parser().parsestr(wheel.read(f"{info}/METADATA").decode("utf-8"))
        licence = wheel.read(f"{info}/licenses/LICENSE") if f"{info}/licenses/LICENSE" in names else b""
    files = {name for name in names if not name.startswith(f"{info}/")}
    committed = {name for name in _committed() if name.startswith(CODE)}
    require(f"{path.name}: files that are not committed", files - committed)
    require(f"{path.name}: files that are missing", committed - files)
    require(f"{path.name}: files that are neither Python nor the demo's", _foreign(files))
    if licence != (ROOT / "LICENSE").read_bytes():
        raise SystemExit(f"release: {path.name}: must hold LICENSE.")
    if (metadata["Name"], metadata["Version"]) != ("rim-peft", VERSION):
        raise SystemExit(f"release: {path.name}: must be rim-peft {VERSION}, got {metadata['Version']}.")


def check_source(path: Path) -> None:
    """Check that a source distribution holds package, recipes, README, changelog and licence, and nothing else."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    require(f"{path.name}: unexpected files", {n for n in names - SOURCE_FILES if not n.startswith(SOURCE)})
    wanted = {name for name in _committed() if name.startswith((*CODE, "recipes/"))} | SOURCE_FILES
    require(f"{path.name}: files that are missing", wanted - names)
    require(f"{path.name}: files that are neither Python nor the demo's", _foreign(names))


def check_tag(ref: str) -> None:
    """Check, if a tag is released, that it is the version, and that the changelog has a section for it."""
    if not ref.startswith("refs/tags/"):
        return
    if ref != f"refs/tags/v{VERSION}":
        raise SystemExit(f"release: the tag must be v{VERSION}, as in rim_peft/version.py, got {ref}.")
    if not re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE):
        raise SystemExit(f"release: CHANGELOG.md must have a section '## {VERSION}'.")


def install(requirement: str) -> None:
    """Install the wheel, or one of its extras, with its dependencies into an environment that has nothing else."""
    pip = [str(INSTALLED / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), requirement], check=True)


def try_wheel() -> None:
    """Run commands of the installed wheel in an empty folder."""
    shutil.rmtree(EMPTY, ignore_errors=True)
    package = Path(run("python", "-c", "import rim_peft; print(rim_peft.__file__)").strip()).parent
    if INSTALLED not in package.parents:
        raise SystemExit(f"release: the installed package must be used, got {package}.")
    expect(run("rim-peft", "--version"), f"rim-peft {VERSION}")
    expect(run("rim-peft", "demo", "--help"), "KEY=VALUE")
    base = f"model.name_or_path={package / 'demo' / 'base'}"
    expect(run("rim-peft", "check", str(package / "demo" / "recipe.yaml"), base), ": ok")
    expect(run("rim-peft", "demo", "--output-dir", "two-steps", *SHORT), "RiM, after the last block")
    expect(run("rim-peft", "inspect", "two-steps", QUESTION, "--out", "page.html"), "block 4")
    expect((EMPTY / "page.html").read_text(encoding="utf-8"), "</html>")


def try_app() -> None:
    """Ask the app a question by its own client, and end it as Ctrl-C does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so do their children
    with start("rim-peft", "app", "two-steps", stdout=subprocess.PIPE, text=True) as app:
        too_long = Timer(600, app.kill)
        too_long.start()
        try:
            address = (app.stdout or sys.stdin).readline().partition(" ")[0]
            expect(run("python", "-c", ASK, address, QUESTION), "after 4 blocks")
            app.send_signal(signal.SIGINT)
            code = app.wait(timeout=60)
        finally:
            too_long.cancel()
            app.kill()
    if code != 128 + signal.SIGINT:
        raise SystemExit(f"release: rim-peft app must end with {128 + signal.SIGINT} when interrupted, got {code}.")


def run(program: str, *arguments: str) -> str:
    """Run a program of the environment; return and print what it prints."""
    with start(program, *arguments, stdout=subprocess.PIPE, text=True) as running:
        printed, _ = running.communicate()
    print(printed)
    if running.returncode:
        raise SystemExit(f"release: {program} must end with 0, got {running.returncode}.")
    return str(printed)


def start(program: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a program of the environment, away from the clone."""
    EMPTY.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    print("release:", program, *arguments, flush=True)
    return subprocess.Popen([str(INSTALLED / "bin" / program), *arguments], cwd=EMPTY, env=environment, **options)


def expect(printed: str, text: str) -> None:
    """Stop if a command did not print a text."""
    if text not in printed:
        raise SystemExit(f"release: the command must print {text!r}.")


def require(what: str, names: Iterable[str]) -> None:
    """Stop if there are any of these names."""
    if found := sorted(names):
        raise SystemExit(f"release: {what}: must be none, got {', '.join(found)}. See pyproject.toml and MANIFEST.in.")


def _foreign(names: Iterable[str]) -> set[str]:
    inside = {name for name in names if name.startswith("rim_peft/")}
    return {name for name in inside if not name.endswith(".py") and not NOT_CODE.fullmatch(name)}


def _committed() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return set(listed.split("\0"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
