"""The Hub, asked once whether it answers: where it does not, what is not on this machine ends in one error at once.

The libraries that read from it try several times for each file, which takes a minute and more until they give up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session

_PATIENCE_SECONDS = 4.0
_ASK_AGAIN_SECONDS = 60.0

_failures: dict[str, tuple[float, str]] = {}
"""When an address did not answer, and why."""
_answered: set[str] = set()


def hub_problem() -> str | None:
    """Return why the Hub is not to be asked: it is turned off, or does not answer; None if it does.

    It has four seconds, or what ``HF_HUB_ETAG_TIMEOUT`` says. An answer is remembered, a failure for a minute.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    address = str(constants.ENDPOINT)
    if address in _answered:
        return None
    failed, why = _failures.get(address, (-_ASK_AGAIN_SECONDS, ""))
    if time.monotonic() - failed < _ASK_AGAIN_SECONDS:
        return why
    if (found := _ask(address)) is None:
        _answered.add(address)
        return None
    _failures[address] = time.monotonic(), found
    return found


@contextmanager
def asking_hub(source: str) -> Iterator[str | None]:
    """While entered, let the libraries read ``source``: what they have kept of it alone where the Hub does not answer.

    Their own argument for that, ``local_files_only``, does not reach all that they ask.

    Args:
        source: id on the Hub; nothing is asked for a file or folder.

    Yields:
        Why the Hub is not asked; None where it is.

    Raises:
        ConnectionError: the Hub is not asked, and what was looked for is not here.
    """
    problem = None if Path(source).exists() else hub_problem()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if problem is not None:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield problem
    except OSError as error:
        if problem is None or not source:
            raise
        raise ConnectionError(f"{source} is not on this machine, and {problem}") from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _ask(address: str) -> str | None:
    """Return why an address does not answer, None if it does, with whatever answer."""
    own = "HF_HUB_ETAG_TIMEOUT" in os.environ
    patience = float(constants.HF_HUB_ETAG_TIMEOUT) if own else _PATIENCE_SECONDS
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(address, timeout=patience)
            outcome.append(None)
        except Exception as error:  # of the HTTP client, which differs with the version of huggingface_hub
            outcome.append(str(error).partition("\n")[0] or type(error).__name__)

    # In a thread, since looking up a name has no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience + 0.5)
    why = outcome[0] if outcome else f"no answer within {patience:g} s"
    return None if why is None else f"the Hub ({address}) cannot be reached: {why}"
