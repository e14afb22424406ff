"""Commands, help, exit codes and errors."""

import importlib.abc
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rim_peft_command
from rim_peft.cli import check
from rim_peft.cli.console import say, use_utf8
from rim_peft.cli.main import main
from rim_peft_command import COMMANDS

RECIPES = Path(__file__).parents[3] / "recipes"


def run_main(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--help") == 0
    out = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert name in out
        assert summary in out
    assert "exit codes: 0 done, 1 failed, 2 wrong usage" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run_main(name, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: rim-peft {name}" in out
    assert "--traceback" in out


def test_the_help_of_train_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("train", "-h") == 0
    out = capsys.readouterr().out
    for key in ("data.path (null)", "output_dir (must be given)", "adapter.num_blocks (8)", 'grounding.schedule ("rel'):
        assert f"  {key}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["--json", "evaluate", "x"], "unrecognized arguments: --json"),
        (["train"], "required: RECIPE"),
        (["check"], "required: RECIPE"),
        (["check", "x", "--row-tokens", "0"], "must be at least 1, got 0"),
        (["evaluate", "x", "--limit", "0"], "must be at least 1, got 0"),
        (["evaluate", "x", "--limit", "many"], "argument --limit"),
        (["generate", "x", "--num-block", "-1"], "argument --num-block"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run_main(*arguments) == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--version") == 0
    assert capsys.readouterr().out.startswith("rim-peft ")


def test_an_error_is_one_line_and_a_flag_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("train", "missing.yaml") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "rim-peft: error: [Errno 2] No such file or directory: 'missing.yaml'\n"
    with pytest.raises(FileNotFoundError):
        main(["train", "missing.yaml", "--traceback"])


def test_all_problems_of_a_recipe_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "gsm8k" / "tiny.yaml")
    assert run_main("train", recipe, "adapter.num_blcks=2", "sead=1") == 1
    assert capsys.readouterr().err.splitlines() == [
        "command line: adapter.num_blcks: unknown key, did you mean num_blocks?",
        "command line: sead: unknown key, did you mean seed?",
    ]


def test_interruption_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    def terminate(args: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(check, "run", interrupt)
    assert run_main("check", "x") == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(check, "run", terminate)
    assert run_main("check", "x") == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_interruption_of_the_first_import_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Importing(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *unused: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["rim-peft", "check", "x"])
    monkeypatch.delitem(sys.modules, "rim_peft.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Importing()])
    assert rim_peft_command.main() == 130
    assert capsys.readouterr().err == "rim-peft: interrupted\n"


def test_what_is_said_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also into a pipe, such as the address of a page that stays for hours."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="utf-8"))
    say("http://127.0.0.1:7860")
    assert pipe.getvalue() == f"http://127.0.0.1:7860{os.linesep}".encode()


@pytest.mark.parametrize(
    ("arguments", "begins"), [(["rim_peft", "--version"], "rim-peft "), (["benchmarks", "--list"], "one_pass ")]
)
def test_modules_run_as_commands(arguments: list[str], begins: str) -> None:
    """Launchers start modules: ``accelerate launch -m rim_peft train``. Nothing of libraries is printed."""
    command = [sys.executable, "-m", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.startswith(begins)
    assert found.stderr == ""


def test_launchers_start_training_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_main("evaluate", "outputs/run") == 2
    assert "evaluate runs in one process, got 2: start it without a launcher" in capsys.readouterr().err


def test_a_recipes_errors_are_printed_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, num_lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert run_main("train", str(RECIPES / "prosqa" / "tiny.yaml"), "adapter.num_blcks=2") == 1
        assert len(capsys.readouterr().err.splitlines()) == num_lines


def test_an_error_says_in_which_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_main("train", "missing.yaml") == 1
    assert "rim-peft: error in process 1: " in capsys.readouterr().err


def test_output_is_utf8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    use_utf8()
    print("\u00e9\ud83d", flush=True)
    assert written.getvalue() == b"\xc3\xa9\\ud83d\n"


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["--help"], 0), (["trian"], 2), ([], 2)])
def test_what_there_is_is_said_without_importing_the_package(arguments: list[str], status: int) -> None:
    program = (
        "import atexit, sys, rim_peft_command\n"
        "atexit.register(lambda: print(*(name for name in ('rim_peft', 'peft', 'torch') if name in sys.modules)))\n"
        "sys.exit(rim_peft_command.main())"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1].strip() == ""
    if arguments == ["--version"]:
        assert done.stdout.startswith("rim-peft 0.")


@pytest.mark.slow
def test_the_command_is_the_packages(tmp_path: Path) -> None:
    """What a terminal would act on goes the long way, where it is escaped."""
    for argument in ("cl\x1b[2Jear", "cache"):
        program = "import sys, rim_peft_command; sys.exit(rim_peft_command.main())"
        command = [sys.executable, "-c", program, argument]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
        )
        assert done.returncode == (0 if argument == "cache" else 2), done.stderr
        assert "\x1b" not in done.stderr
        assert argument != "cache" or not done.stderr
