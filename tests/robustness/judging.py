"""What counts as right: a case ends with a correct result or with one clear error, in bounded time."""

from __future__ import annotations

import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType

import rim_peft

MAX_CPU_SECONDS = 5.0
MAX_WALL_SECONDS = 60.0
"""Machines are shared, so that the processor's time is what counts; the clock catches a case that waits for nothing."""

_MAX_LINE = 600
_PACKAGE = Path(rim_peft.__file__).parent
_CLEAR_KINDS = (ValueError, OSError, ImportError)
_OF_OTHERS = re.compile(
    r"Traceback|object has no attribute|not subscriptable|unhashable|unexpected keyword argument|NoneType"
    r"|Expecting value|Extra data|codec can't|surrogates not allowed|enforce fail|weights_only|not supported between"
    r"|invalid literal|list index out of range|missing \d+ required|cannot convert|out of range|has no len"
)
"""Words of Python's and of other libraries' errors, which tell a user nothing of their file."""


class Verdict(str, Enum):
    """How a case ended."""

    RIGHT = "right"
    REFUSED = "refused clearly"
    WRONG = "wrong"


@dataclass(frozen=True)
class Case:
    """One input that somebody could give.

    Attributes:
        name: what is special about it; enough to find it again with the campaign's seed.
        run: gives the input to the package; returns None if the result is right, else what is wrong with it.
        names: a refusal must hold one of these (the file, the field, the row), in any case of letters.
        size: how many inputs it counts as, such as a file's rows.
    """

    name: str
    run: Callable[[], str | None]
    names: tuple[str, ...] = ()
    size: int = 1


@dataclass(frozen=True)
class Outcome:
    """How a case ended, and why if it went wrong."""

    case: Case
    verdict: Verdict
    detail: str = ""


class RefusedError(Exception):
    """What a case was refused with where that is text, as a command writes it to stderr."""


class HangError(BaseException):
    """A case took too long; not an ``Exception``, so that nothing under test takes it for an error of its own."""


def judge(case: Case) -> Outcome:
    """Run a case and judge how it ended."""
    try:
        with _bounded():
            complaint = case.run()
    except HangError as error:
        return Outcome(case, Verdict.WRONG, f"takes too long: {error}")
    except Exception as error:
        is_text = isinstance(error, RefusedError)
        complaint = unclear_text(str(error), case.names) if is_text else unclear_error(error, case.names)
        if complaint is None:
            return Outcome(case, Verdict.REFUSED)
        return Outcome(case, Verdict.WRONG, f"{complaint}: {type(error).__name__}: {str(error)[:_MAX_LINE]!r}")
    return Outcome(case, Verdict.RIGHT) if complaint is None else Outcome(case, Verdict.WRONG, complaint)


def unclear_error(error: Exception, names: tuple[str, ...]) -> str | None:
    """Return why an error is no clear refusal, None if it is one."""
    if not isinstance(error, _CLEAR_KINDS) or isinstance(error, UnicodeError):
        return f"not an error for users, from {_origin(error)}"
    if not _is_ours(error):
        return f"raised outside of this package, from {_origin(error)}"
    return unclear_text(str(error), names)


def unclear_text(text: str, names: tuple[str, ...]) -> str | None:
    """Return why a message is no clear one, None if it is: it names what it is about, in lines that can be read."""
    if not text.strip():
        return "says nothing"
    if any(len(line) > _MAX_LINE for line in text.splitlines()):
        return "has a line that is too long to be read"
    if found := _OF_OTHERS.search(text):
        return f"has another library's words ({found[0]!r})"
    if names and not any(name.lower() in text.lower() for name in names):
        return f"names none of {', '.join(names[:5])}"
    return None


def _is_ours(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)


def _origin(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    last = (own or frames)[-1]
    return f"{os.path.relpath(last.filename, _PACKAGE.parent)}:{last.lineno}"


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        kind = "processor's" if number == signal.SIGPROF else "clock's"
        raise HangError(
            f"over {MAX_CPU_SECONDS if number == signal.SIGPROF else MAX_WALL_SECONDS} of the {kind} seconds"
        )

    before = signal.signal(signal.SIGPROF, stop), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])
