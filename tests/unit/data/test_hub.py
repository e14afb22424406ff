"""A Hub that does not answer is asked once, and what is not here then ends in one error at once."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants as hub_constants
import pytest
from safetensors.torch import load_file, save_file

from rim_peft.data import sources as hub
from rim_peft.data.sources import find_splits
from rim_peft.recipe import ModelOptions
from rim_peft.run import load_run
from rim_peft.run.base import load_base, load_config
from rim_peft.run.sharing import push
from rim_peft.run.tokenizer import load_tokenizer
from tests.conftest import build_rim


class Silent:
    """A server that takes connections and never says a word."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def count(self) -> int:
        """How many have connected."""
        self.socket.setblocking(False)
        number = 0
        while True:
            try:
                self.socket.accept()[0].close()
            except BlockingIOError:
                return number
            number += 1


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Silent]:
    server = Silent()
    monkeypatch.setattr(hub_constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(hub, "_PATIENCE_SECONDS", 0.2)
    yield server
    server.socket.close()


def test_a_silent_hub_is_asked_once_for_everything(silent: Silent, tmp_path: Path) -> None:
    build_rim().save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    options = ModelOptions(name_or_path="owner/base")
    cannot = f"the Hub \\({silent.url}\\) cannot be reached"
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError, match=f"owner/none: .*{cannot}"):
        load_run("owner/none")
    with pytest.raises(ConnectionError, match=f"path: owner/rows .*{cannot}"):
        find_splits("owner/rows")
    with pytest.raises(ConnectionError, match=f"owner/new: cannot be uploaded: {cannot}"):
        push(tmp_path / "adapter", "owner/new", base="owner/base")
    for load in (load_base, load_config, load_tokenizer):
        with pytest.raises(OSError, match=f"owner/base is not on this machine, and {cannot}"):
            load("owner/base", options)
    assert time.monotonic() - begun < 10
    assert silent.count() == 1
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_base_that_is_not_here_is_said_to_be_out_of_reach(silent: Silent, tmp_path: Path) -> None:
    model = build_rim()
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(OSError, match=r"the base 'owner/base' of .* cannot be loaded: .* the Hub .* cannot be reached"):
        load_run(tmp_path)


def test_a_hub_that_is_turned_off_is_not_asked(silent: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert hub.hub_problem() == "HF_HUB_OFFLINE is set"
    with pytest.raises(ConnectionError, match=r"path: owner/rows .*HF_HUB_OFFLINE is set"):
        find_splits("owner/rows")
    assert silent.count() == 0


def test_a_refusal_is_known_at_once_and_patience_of_the_users_own_counts(
    silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr(hub_constants, "HF_HUB_ETAG_TIMEOUT", 1)
    begun = time.monotonic()
    assert "cannot be reached" in str(hub.hub_problem())
    assert time.monotonic() - begun >= 0.9
    silent.socket.close()
    monkeypatch.setattr(hub_constants, "ENDPOINT", silent.url + "/")
    assert "refused" in str(hub.hub_problem())
    with hub.asking_hub(str(Path(__file__).parent)) as problem:
        assert problem is None


def test_weights_that_are_not_finite_are_not_pushed(silent: Silent, tmp_path: Path) -> None:
    build_rim().save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor * math.inf for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=r"its weights must be finite.*holds -?(inf|nan)"):
        push(tmp_path, "owner/new", base="owner/base")
    assert silent.count() == 0
