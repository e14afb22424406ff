"""A small run of both stages, killed and stopped at every moment, and resumed: does it end with the same weights?

``python -m tests.robustness.crash_points`` tries all moments and prints a table. Processes are forked, so that what
is imported once serves all of them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from rim_peft.recipe import Recipe, load_recipe
from rim_peft.run import training
from rim_peft.training.curriculum import Interrupted
from rim_peft.training.readout_trainer import ReadoutTrainer

STAGES = ("grounding", "refinement")
MAX_SECONDS = 120.0
NUM_RANDOM = 10

_TIMES = ("runtime", "_per_second", "train_seconds", "train_loss")
"""What differs between equal runs. (The mean loss of a stage is that of the steps since it was resumed.)"""


@dataclass(frozen=True)
class Moment:
    """A moment of a run at which something happens to it.

    Attributes:
        way: ``"killed"``; ``"cut"``, which leaves half of the file that is being written; ``"stopped"`` by SIGTERM; or
            ``"random"``, killed from outside.
        number: which moment of its kind it is, in the order in which the run has them; for ``"random"`` thousandths of
            the run's time.
        what: what the run was about to do.
    """

    way: str
    number: int
    what: str = ""


def write_recipe(
    folder: Path,
    *,
    quantization: str | None = None,
    optim: str = "adamw_torch",
    scored: str = "steps",
    **refinement: Any,
) -> Recipe:
    """Write rows and a recipe: stage 1 by steps, stage 2 by epochs, with checkpoints and scores between and at ends.

    Args:
        folder: where to write them.
        quantization: of the base.
        optim: both stages' optimiser.
        scored: ``eval_strategy`` of stage 1; with ``"no"`` its last weights alone are scored, after the training.
        refinement: further options of stage 2.
    """
    rows = _write_rows(folder / "rows")
    width = 64 if quantization else 32  # nf4 has blocks of 64
    stage: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "dropout": 0.1,  # so that random state matters
        "optim": optim,
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    document = {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 270,
                "hidden_size": width,
                "intermediate_size": width,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.2,
            },
            "quantization": quantization,
        },
        "adapter": {"num_blocks": 2, "r": 4},
        "data": {"task": "gsm8k", "path": str(rows), "validation_rows": 2},
        "grounding": {**stage, "max_steps": 3, "eval_strategy": scored, "eval_steps": 2},
        "refinement": {**stage, "num_train_epochs": 2, "eval_strategy": "epoch", **refinement},
        "evaluation": {"max_new_tokens": 2},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_recipe(path)


def _write_rows(folder: Path) -> Path:
    """Write eight rows of each split, of two steps each, and return the folder."""
    folder.mkdir(parents=True)
    for split, first in (("train", 2), ("valid", 40), ("test", 60)):
        lines = [
            {"question": f"3 bags of {n}?", "answer": f"<<3*{n}={3 * n}>> <<{3 * n}+0={3 * n}>>\n#### {3 * n}"}
            for n in range(first, first + 8)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def digest_run(folder: Path) -> dict[str, Any]:
    """Return all of a finished run that must not depend on how often it was stopped."""
    record = json.loads((folder / "run.json").read_text())
    found: dict[str, Any] = {"best": record["metrics"]["best"], "validation": record["metrics"]["validation"]}
    for path in (folder / "adapter_model.safetensors", *(folder / stage / "final.safetensors" for stage in STAGES)):
        found[path.relative_to(folder).as_posix()] = {
            name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in sorted(load_file(path).items())
        }
    for stage in STAGES:
        found[stage] = [
            {name: value for name, value in line.items() if not name.endswith(_TIMES)}
            for line in json.loads((folder / stage / "history.json").read_text())
        ]
    return found


class Subject:
    """A run that can be made over and over, each time in a process of its own.

    Args:
        recipe: what to train.
        folder: where the runs are made.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder
        started = time.monotonic()
        run = folder / "unbroken"
        self._train(run, resume=False, watch=self._note_moments)
        self.seconds = time.monotonic() - started
        self.expected = digest_run(run)
        kept = [tuple(line) for line in json.loads((folder / "moments.json").read_text())]
        operations = [what for kind, what in kept if kind == "operation"]
        files = [what for kind, what in kept if kind == "file"]
        works = [what for kind, what in kept if kind == "work"]
        self.moments = [
            *(Moment("killed", number, what) for number, what in enumerate(operations)),
            *(Moment("cut", number, what) for number, what in enumerate(files)),
            *(Moment("stopped", number, what) for number, what in enumerate(works)),
        ]

    def random_moments(self, num: int, *, seed: int) -> list[Moment]:
        """Return moments at which a run is killed from outside."""
        draw = random.Random(seed)
        return [Moment("random", draw.randrange(1000)) for _ in range(num)]

    def try_moment(self, moment: Moment) -> str | None:
        """Let a run be killed or stopped at a moment, resume it, and return in what it differs, None if in nothing."""
        run = self._folder / f"{moment.way}-{moment.number}"
        try:
            self.strike(run, moment)
            self.attempt(run, resume=True)
            differing = self.differing(run)
        except (RuntimeError, OSError, ValueError) as error:
            return str(error)
        finally:
            shutil.rmtree(run, ignore_errors=True)
        return f"other {', '.join(differing)}" if differing else None

    def strike(self, run: Path, moment: Moment, **changes: Any) -> None:
        """Train into a folder up to a moment, with changes to the recipe."""
        self._train(run, resume=False, watch=lambda folder: self._strike(folder, moment), moment=moment, **changes)

    def attempt(self, run: Path, prepare: Callable[[Path], Any] | None = None, *, resume: bool = False) -> str:
        """Train into a folder, after ``prepare`` has changed something in the process, and return what was said.

        Raises:
            RuntimeError: it failed; with its last line.
        """
        return self._train(run, resume=resume, watch=prepare)

    def differing(self, run: Path) -> list[str]:
        """Return in what a finished run is not as the unbroken one."""
        found = digest_run(run)
        return [name for name, value in self.expected.items() if found[name] != value]

    def _train(
        self,
        run: Path,
        *,
        resume: bool,
        watch: Callable[[Path], Any] | None = None,
        moment: Moment | None = None,
        **changes: Any,
    ) -> str:
        recipe = replace(self._recipe, output_dir=str(run), resume=resume, **changes)

        def work() -> None:
            training.Validation.__call__ = _score
            if watch is not None:
                watch(run)
            with suppress(Interrupted):
                training.train(recipe)

        delay = self.seconds * moment.number / 1000 if moment is not None and moment.way == "random" else None
        status, said = run_forked(work, kill_after=delay)
        if status != 0 and moment is None:
            raise RuntimeError(said.strip().splitlines()[-1] if said.strip() else f"ended with {status}")
        return said

    def _note_moments(self, run: Path) -> None:
        moments: list[tuple[str, str]] = []
        original = training._write_end

        def write_end(*args: Any) -> None:
            original(*args)
            (self._folder / "moments.json").write_text(json.dumps(moments))

        training._write_end = write_end
        watch_run(run, lambda kind, what, cut: moments.append((kind, what)))

    def _strike(self, run: Path, moment: Moment) -> None:
        kind = {"killed": "operation", "cut": "file", "stopped": "work"}.get(moment.way)
        counts: Counter[str] = Counter()

        def strike(now: str, what: str, cut: Callable[[], None] | None) -> None:
            counts[now] += 1
            if now != kind or counts[now] != moment.number + 1:
                return
            if moment.way == "stopped":
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if moment.way == "cut" and cut is not None:
                cut()
            os.kill(os.getpid(), signal.SIGKILL)

        watch_run(run, strike)


def _score(validation: Any, model: Any) -> dict[str, float]:
    """A score that goes up and down with the weights, and is often the same, where so small a model is always wrong."""
    total = sum(float(tensor.detach().double().abs().sum()) for tensor in model.parameters() if tensor.requires_grad)
    return {"accuracy": round(total * 100 % 1, 1)}


def watch_run(run: Path, tell: Callable[[str, str, Callable[[], None] | None], None]) -> None:
    """Tell of all that a run does in its folder, before it does it; for the rest of this process.

    ``tell`` is given the kind (an operation on files, a file that is written, or work on the model), what it is about,
    and for a file what writes half of it.
    """
    is_telling = False
    inside = f"{run}{os.sep}"

    def say(kind: str, what: str, cut: Callable[[], None] | None = None) -> None:
        nonlocal is_telling
        if is_telling:
            return
        is_telling = True
        try:
            tell(kind, what, cut)
        finally:
            is_telling = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = isinstance(path, str) and (set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR))
            if writes and path.startswith(inside):
                say("operation", f"open {path[len(inside) :]}")
                say("file", path[len(inside) :], lambda: Path(path).write_bytes(b""))
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            path = os.fspath(args[0])
            is_new = event != "os.mkdir" or not os.path.isdir(path)
            if isinstance(path, str) and path.startswith(inside) and is_new:
                say("operation", f"{event} {path[len(inside) :]}")

    sys.addaudithook(hook)

    def tell_of_writer(args: tuple[Any, ...], position: int, write: Callable[[], Any]) -> None:
        path = str(args[position])

        def cut() -> None:
            write()
            os.truncate(path, Path(path).stat().st_size // 2)

        if path.startswith(inside):
            say("file", path[len(inside) :], cut)

    _before(torch, "save", lambda args, write: tell_of_writer(args, 1, write))
    _before(safetensors.torch, "serialize_file", lambda args, write: tell_of_writer(args, 1, write))
    for owner, name in (
        (ReadoutTrainer, "training_step"),
        (training.Validation, "__call__"),
        (training.Validation, "report"),
    ):
        _before(owner, name, lambda args, work, name=name: (say("operation", name), say("work", name)))


def _before(owner: Any, name: str, tell: Callable[[tuple[Any, ...], Callable[[], Any]], Any]) -> None:
    """Replace a function by one that first tells of its arguments, and of what it is about to do."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        tell(args, lambda: original(*args, **kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, call)


def run_forked(work: Callable[[], None], *, kill_after: float | None = None) -> tuple[int, str]:
    """Do something in a child of this process, and return its exit code (minus a signal's number) and its words."""
    gc.freeze()  # or a collection in the child would copy all that the parent holds
    read_end, write_end = os.pipe()  # not a file, which a child with a limit on its files' size could not write
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read_end)  # or nothing would tell the child that its parent is gone
            torch.set_num_threads(1)  # others' results could differ from process to process
            tqdm.set_lock(threading.RLock())  # its own is shared by processes, and a killed one would keep it for ever
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            sys.stdout = sys.stderr = os.fdopen(write_end, "w", encoding="utf-8")  # not what pytest has put there
            try:
                work()
                code = 0
            except BaseException as error:
                traceback.print_exc()
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.stderr.flush()
        finally:
            os._exit(code)  # whatever happens: a child that went on would run the tests a second time
    os.close(write_end)
    gc.unfreeze()
    os.set_blocking(read_end, False)
    deadline = time.monotonic() + (MAX_SECONDS if kill_after is None else kill_after)
    said = b""
    with open(read_end, "rb", buffering=0) as pipe:
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            said += pipe.read() or b""
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.005)
        said += pipe.read() or b""
    return os.waitstatus_to_exitcode(ended[1]), said.decode(errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try every moment, and print how many runs ended as the unbroken one; 1 if any did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.crash_points", description=main.__doc__)
    parser.add_argument("--quantization", help="nf4 or int8 (none)")
    parser.add_argument("--optim", default="adamw_torch", help="(%(default)s)")
    parser.add_argument("--scored", default="steps", help="eval_strategy of stage 1 (%(default)s)")
    parser.add_argument("--only", nargs="*", default=(), help="ways: killed, cut, stopped, random (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        recipe = write_recipe(Path(name), quantization=args.quantization, optim=args.optim, scored=args.scored)
        subject = Subject(recipe, Path(name))
        results: dict[str, Counter[str]] = {}
        moments = [*subject.moments, *subject.random_moments(NUM_RANDOM, seed=args.seed)]
        for number, moment in enumerate(moments):
            print(f"\r{number}/{len(moments)}", end="", file=sys.stderr, flush=True)
            if args.only and moment.way not in args.only:
                continue
            complaint = subject.try_moment(moment)
            results.setdefault(moment.way, Counter())["other" if complaint else "equal"] += 1
            if complaint:
                print(f"\r{moment}: {complaint}", file=sys.stderr, flush=True)
    print(f"\n{'':<10}{'tried':>8}{'equal':>8}{'other':>8}")
    for way, counts in results.items():
        print(f"{way:<10}{counts.total():>8}{counts['equal']:>8}{counts['other']:>8}")
    return 1 if any(counts["other"] for counts in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
