"""A run's folder with one of its files damaged: the same weights, or one error that names the file."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rim_peft.run import training
from rim_peft.run.output_folder import RECIPE_FILE, holds_run
from rim_peft.training.files import InUseError
from tests.conftest import held_by_a_child
from tests.robustness.crash_points import Subject, write_recipe
from tests.robustness.judging import unclear_text

NUM_QUICK = 2


def _empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path, other: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) * 3 // 4] ^= 4
    path.write_bytes(contents)


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _swap(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "missing": _delete,
    "empty": _empty,
    "cut": _cut,
    "flipped": _flip,
    "of another run": _swap,
}


class Stopped:
    """A run stopped within stage 2, and another run with another seed that was stopped there too."""

    def __init__(self, folder: Path) -> None:
        self.subject = Subject(write_recipe(folder, reset_optimizer=False), folder)
        (work,) = [
            moment for moment in self.subject.moments if moment.way == "stopped" and moment.number == self._third_step()
        ]
        self.run, self.other, self._copies = folder / "run", folder / "other", folder / "copies"
        self.subject.strike(self.run, work)
        self.subject.strike(self.other, work, seed=1)
        self.files = sorted(
            path.relative_to(self.run).as_posix()
            for path in self.run.rglob("*")
            if path.is_file() and path.suffix != ".md" and path.name not in (RECIPE_FILE, ".lock")
        )

    def _third_step(self) -> int:
        """The number of stage 2's third step among all moments of work: two checkpoints lie behind it."""
        works = [moment for moment in self.subject.moments if moment.way == "stopped"]
        return [moment.number for moment in works if moment.what == "training_step"][5]

    def answer(self, name: str, damage: str) -> str | None:
        """Damage a file of a copy, resume, and return what is wrong with what comes of it, None if it is right."""
        copy = self._copies / "run"
        shutil.copytree(self.run, copy)
        try:
            DAMAGES[damage](copy / name, self.other / name)
            self.subject.attempt(copy, resume=True)
            differing = self.subject.differing(copy)
            return f"other {', '.join(differing)}" if differing else None
        except RuntimeError as error:
            return unclear_text(str(error), (name, Path(name).name)) and str(error)
        finally:
            shutil.rmtree(copy)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    return Stopped(tmp_path_factory.mktemp("damaged"))


def _complaints(stopped: Stopped, cases: list[tuple[str, str]]) -> Iterator[str]:
    for name, damage in cases:
        if complaint := stopped.answer(name, damage):
            yield f"{name} {damage}: {complaint}"


def _cases(stopped: Stopped) -> list[tuple[str, str]]:
    # Another run's best adapter of the same step that scored the same, as these do, cannot be told from this one's.
    unknowable = ("best.safetensors", "of another run")
    return [(name, damage) for name in stopped.files for damage in DAMAGES if (name, damage) != unknowable]


def test_some_damages(stopped: Stopped) -> None:
    cases = random.Random(0).sample(_cases(stopped), NUM_QUICK)
    cases += [("refinement/checkpoint-3/optimizer.pt", "missing"), ("best.safetensors", "flipped")]
    assert not list(_complaints(stopped, cases))


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_all_damages(part: int, stopped: Stopped) -> None:
    cases = _cases(stopped)
    assert len(cases) > 100
    assert not list(_complaints(stopped, cases[part::2]))


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ("", False),
        (".recipe.yaml.partial", False),
        (".lock .holder.json .recipe.yaml.partial", False),
        ("recipe.yaml .lock", False),
        (".rim-peft-abc/ .lock", False),
        ("recipe.yaml base.partial/", False),
        ("recipe.yaml base/ .lock", False),
        ("recipe.yaml base/ grounding/", True),
        ("base/", True),  # somebody else's, since a run writes its recipe first
        ("base.partial/", True),
        ("notes.txt", True),
    ],
)
def test_what_a_run_left_that_had_not_begun_is_no_run(left: str, expected: bool, tmp_path: Path) -> None:
    for name in left.split():
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("")
    assert holds_run(tmp_path) is expected


def test_a_run_that_was_killed_before_it_began_starts(stopped: Stopped, tmp_path: Path) -> None:
    """With ``resume=true`` too, which the crash points try."""
    moments = stopped.subject.moments
    (moment,) = [one for one in moments if one.way == "killed" and one.what == "os.rename .recipe.yaml.partial"]
    run = tmp_path / "run"
    stopped.subject.strike(run, moment)
    assert sorted(path.name for path in run.iterdir()) == [".holder.json", ".lock", ".recipe.yaml.partial"]
    stopped.subject.attempt(run)
    assert not stopped.subject.differing(run)


def test_a_second_training_into_the_folder_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    folder = Path(recipe.output_dir)
    with (
        held_by_a_child(folder) as child,
        pytest.raises(InUseError, match=rf"output_dir: {folder} is in use by process {child} on "),
    ):
        training.train(recipe)


def _fail_in_torch(run: Path) -> None:
    def save(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 448 vs 342")

    torch.save = save  # type: ignore[assignment]


def _fail_in_safetensors(run: Path) -> None:
    def serialize_file(*args: Any, **kwargs: Any) -> None:
        raise safetensors.SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })")

    safetensors.torch.serialize_file = serialize_file


def _limit(size: int) -> Callable[[Path], None]:
    return lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    "fill",
    [
        _fail_in_torch,
        pytest.param(_fail_in_safetensors, marks=pytest.mark.slow),
        *(pytest.param(_limit(size), marks=pytest.mark.slow) for size in (3_000, 20_000, 40_000, 100_000)),
    ],
    ids=["torch", "safetensors", "3 kB", "20 kB", "40 kB", "100 kB"],
)
def test_a_full_disk_is_named_and_the_run_goes_on(
    fill: Callable[[Path], None], tmp_path: Path, stopped: Stopped
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"no room to write in .*disk is full.*with resume=true") as full:
        stopped.subject.attempt(run, fill)
    assert unclear_text(str(full.value), (str(run),)) is None
    stopped.subject.attempt(run, resume=True)
    assert not stopped.subject.differing(run)
