"""Adapters go to the Hub and come back: against a Hub on the loopback interface."""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import Tensor
from torch.testing import assert_close

from rim_peft.app import push_space
from rim_peft.cli.main import main
from rim_peft.recipe import load_recipe
from rim_peft.run import Run, load_run, train
from rim_peft.run.sharing import push
from rim_peft.training.files import MANIFEST
from rim_peft.version import __version__
from tests.conftest import build_base, build_rim, build_tokenizer
from tests.integration.hub_server import TOKEN, serve
from tests.integration.hub_state import Hub
from tests.integration.test_recipes import write_rows

RECIPE = str(Path(__file__).parents[2] / "recipes" / "prosqa" / "tiny.yaml")
SMALL = ["model.config.num_hidden_layers=1", "data.validation_rows=4", "evaluation.max_new_tokens=4"]
STEPS = ["grounding.max_steps=2", "grounding.save_steps=1", "refinement.max_steps=1"]
WEIGHTS = "adapter_model.safetensors"
PAPERS = {"README.md", "recipe.yaml", "run.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A short run of a recipe, and its folder."""
    folder = tmp_path_factory.mktemp("out")
    write_rows(folder / "rows", "prosqa")
    recipe = load_recipe(RECIPE, [f"data.path={folder / 'rows'}", f"output_dir={folder / 'run'}", *SMALL, *STEPS])
    return folder / "run", train(recipe, command=["rim-peft", "train", RECIPE])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that this process takes for the real one, with an empty cache."""
    with serve() as server:
        monkeypatch.setattr(hub_constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def logits(run: Any) -> Tensor:
    config = run.model.peft_config["default"]
    first = config.first_memory_id
    with torch.no_grad():
        return run.model(input_ids=torch.tensor([[20, 30, first, first + 1, first + 1, first + 2]])).logits


@pytest.fixture
def changed(trained: tuple[Path, Run], tmp_path: Path) -> Path:
    """The run's folder with other weights."""
    folder = shutil.copytree(trained[0], tmp_path / "changed")
    run = load_run(folder)
    with torch.no_grad():
        run.model.base_model.memory.rows("default").add_(1)
    run.model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_a_run_comes_back_by_branch_and_commit(hub: Hub, trained: tuple[Path, Run], changed: Path) -> None:
    folder, run = trained
    address = push(folder, "owner/run")
    first = hub.repos["owner/run"].branches["main"]
    assert address == f"{hub.url}/owner/run/commit/{first}"
    push(changed, "owner/run", revision="next", message="Other weights")
    push(changed, "owner/run")
    second = hub.repos["owner/run"].branches["main"]
    assert hub.repos["owner/run"].messages[hub.repos["owner/run"].branches["next"]] == "Other weights"
    assert_close(logits(load_run("owner/run", revision=first)), logits(run), rtol=0, atol=0)
    expected = logits(load_run(changed))
    assert not torch.equal(expected, logits(run))
    for revision in ("next", second, None):
        assert_close(logits(load_run("owner/run", revision=revision)), expected, rtol=0, atol=0)


def test_what_is_uploaded(hub: Hub, trained: tuple[Path, Run]) -> None:
    folder, _ = trained
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert list(folder.glob("grounding/checkpoint-*"))
    push(folder, "owner/run", private=True, license="mit")
    assert ("POST", "/api/validate-yaml", None) in hub.requests
    assert hub.repos["owner/run"].private
    files = hub.files("owner/run")
    base = {f"base/{path.name}" for path in (folder / "base").iterdir() if path.name != MANIFEST}
    assert set(files) == PAPERS | base | {WEIGHTS, "adapter_config.json", ".gitattributes"}
    assert files["recipe.yaml"] == (folder / "recipe.yaml").read_bytes()
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] is None  # a folder of this machine; the base lies beside it
    card = files["README.md"].decode()
    assert 'adapter = "owner/run"' in card
    assert "`rim-peft generate owner/run '" in card
    assert ModelCard(card).data.license == "mit"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_recipe_that_travelled_trains_the_same_weights(hub: Hub, trained: tuple[Path, Run], tmp_path: Path) -> None:
    push(trained[0], "owner/run")
    (tmp_path / "recipe.yaml").write_bytes(hub.files("owner/run")["recipe.yaml"])
    train(load_recipe(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"]))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == hub.files("owner/run")[WEIGHTS]


def test_the_card_of_a_run_says_what_was_run(trained: tuple[Path, Run]) -> None:
    text = (trained[0] / "README.md").read_text()
    card = ModelCard(text)
    validation = trained[1].metrics["validation"]
    (result,) = card.data.eval_results
    assert result.metric_name == "accuracy (answer rule exact-text)"
    assert result.metric_value == validation["accuracy"]
    assert result.metric_args["standard_error"] == validation["standard_error"]
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe == yaml.safe_load((trained[0] / "recipe.yaml").read_text())
    assert f"SHA-256 `{trained[1].record['data']['train']['sha256']}`" in text


@pytest.mark.skipif(
    "constants.ENDPOINT" not in inspect.getsource(ModelCard.validate),
    reason="this version of huggingface_hub validates at huggingface.co alone; a commit validates too",
)
def test_the_card_of_a_run_passes_the_validator(hub: Hub, trained: tuple[Path, Run]) -> None:
    card = ModelCard((trained[0] / "README.md").read_text())
    card.validate()
    assert [path for method, path, _ in hub.requests if method == "POST"] == ["/api/validate-yaml"]
    card.data.license = "none-such"
    with pytest.raises(ValueError, match="license"):
        card.validate()


def test_a_card_that_the_hub_refuses_is_not_uploaded(hub: Hub, trained: tuple[Path, Run]) -> None:
    with pytest.raises(ValueError, match=r'(?s)Invalid metadata in README.md.*"license" must be one of'):
        push(trained[0], "owner/run", license="none-such")
    assert set(hub.files("owner/run")) == {".gitattributes"}


def test_a_broken_download_is_resumed(hub: Hub, trained: tuple[Path, Run]) -> None:
    push(trained[0], "owner/run")
    hub.cuts = {WEIGHTS: [5000]}
    assert_close(logits(load_run("owner/run")), logits(trained[1]), rtol=0, atol=0)
    assert hub.cuts == {WEIGHTS: []}
    assert hub.ranges() == ["bytes=5000-"]


def test_a_download_that_stays_broken_goes_on_later(
    hub: Hub, trained: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    push(trained[0], "owner/run")
    hub.cuts = {WEIGHTS: [0] * 100}
    with pytest.raises(OSError, match=r"owner/run: could not be downloaded .* Run it again: complete files are kept"):
        load_run("owner/run")
    hub.cuts.clear()
    hub.requests.clear()
    assert_close(logits(load_run("owner/run")), logits(trained[1]), rtol=0, atol=0)
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "/api/" not in path]
    assert any(path.startswith("/objects/") for path in fetched)
    assert not any(path.endswith("adapter_config.json") for path in fetched)  # it was whole


def test_a_file_that_was_damaged_after_the_download(hub: Hub, trained: tuple[Path, Run], tmp_path: Path) -> None:
    push(trained[0], "owner/run")
    load_run("owner/run")
    (cached,) = (tmp_path / "cache").rglob(f"snapshots/*/{WEIGHTS}")
    cached.resolve().write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged or cut off .* force_download=True"):
        load_run("owner/run")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("owner/run", "gone", "owner/run: is not a folder, and cannot be read from the Hub at revision 'gone'"),
        ("owner/none", None, "owner/none: is not a folder, and cannot be read from the Hub: "),
    ],
)
def test_what_is_not_on_the_hub(
    hub: Hub, trained: tuple[Path, Run], name: str, revision: str | None, message: str
) -> None:
    push(trained[0], "owner/run")
    with pytest.raises(FileNotFoundError, match=message):
        load_run(name, revision=revision)


def test_pushing_needs_a_token(hub: Hub, trained: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(PermissionError, match=r"owner/run: the Hub must let you write there.*\(401\).*hf auth login"):
        push(trained[0], "owner/run")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter that was saved by hand, on a base in a folder."""
    build_base().save_pretrained(tmp_path / "base")
    model = build_rim()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    build_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_base_that_others_do_not_have_is_named(hub: Hub, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"base: must be an id on the Hub, .*/base' in .*adapter.*\(--base\)"):
        push(saved, "owner/adapter")
    assert not hub.repos
    with caplog.at_level(logging.WARNING, logger="rim_peft"):
        push(saved, "owner/adapter", base="owner/base")
    assert "names no licence" in caplog.text
    files = hub.files("owner/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    card = files["README.md"].decode()
    assert 'base = AutoModelForCausalLM.from_pretrained("owner/base")' in card
    assert ModelCard(card).data.base_model == "owner/base"
    assert str(saved.parent) not in card


def test_a_run_that_has_not_ended_is_not_pushed(hub: Hub, trained: tuple[Path, Run], tmp_path: Path) -> None:
    shutil.copyfile(trained[0] / "recipe.yaml", tmp_path / "recipe.yaml")
    with pytest.raises(FileNotFoundError, match=r"has not finished\. If it is yours: rim-peft train .* resume=true"):
        push(tmp_path, "owner/run")


def test_a_first_push_may_go_to_a_branch(hub: Hub, trained: tuple[Path, Run]) -> None:
    push(trained[0], "owner/run", revision="draft")
    assert set(hub.files("owner/run")) == {".gitattributes"}
    assert_close(logits(load_run("owner/run", revision="draft")), logits(trained[1]), rtol=0, atol=0)


def test_adapters_of_another_kind_are_not_pushed(hub: Hub, saved: Path) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="must hold a RIM adapter, got one of type LORA"):
        push(saved, "owner/adapter")


def test_pefts_own_push_takes_the_runs_papers_along(hub: Hub, trained: tuple[Path, Run]) -> None:
    _, run = trained
    run.model.push_to_hub("owner/by-peft", commit_message="By PEFT", tags=["mine"])
    files = hub.files("owner/by-peft")
    assert set(files) >= PAPERS
    card = ModelCard(files["README.md"].decode())
    assert card.data.tags == ["peft", "rim", "latent-reasoning", "mine"]
    assert "| seed | 0 |" in card.text
    assert_close(logits(load_run("owner/by-peft")), logits(run), rtol=0, atol=0)
    loaded = load_run("owner/by-peft")
    with torch.no_grad():
        loaded.model.base_model.memory.rows("default").add_(1)  # as training on would
    loaded.model.push_to_hub("owner/other")
    other = hub.files("owner/other")
    assert set(other) == {"README.md", WEIGHTS, "adapter_config.json", ".gitattributes"}
    assert "seed" not in other["README.md"].decode()


def test_from_the_command_line(
    hub: Hub, trained: tuple[Path, Run], changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(trained[0]), "owner/run", "--message", "First"]) == 0
    first = hub.repos["owner/run"].branches["main"]
    assert capsys.readouterr().out == f"uploaded: {hub.url}/owner/run/commit/{first}\n"
    assert main(["push", str(changed), "owner/run"]) == 0
    capsys.readouterr()
    answers = []
    for adapter in (["owner/run", "--revision", first], [str(trained[0])]):
        assert main(["generate", *adapter, "Is Bob a p or q?"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    for command, *options in (["evaluate", "--task", "prosqa"], ["export", "--output-dir", "none"]):
        assert main([command, "owner/run", "--revision", "gone", *options]) == 1
        assert "cannot be read from the Hub at revision 'gone'" in capsys.readouterr().err


def test_a_space_shows_the_adapter(
    hub: Hub, trained: tuple[Path, Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(trained[0])
    assert main(["push", folder, "owner/run", "--revision", "v1", "--space", "owner/play", "--private"]) == 0
    commit = hub.repos["spaces/owner/play"].branches["main"]
    assert capsys.readouterr().out.splitlines()[-1] == f"space: {hub.url}/spaces/owner/play/commit/{commit}"
    space = hub.repos["spaces/owner/play"]
    assert (space.sdk, space.private) == ("gradio", True)
    files = hub.files("spaces/owner/play")
    assert set(files) == {"app.py", "requirements.txt", "README.md", ".gitattributes"}
    assert files["requirements.txt"].decode() == f"rim-peft[app]=={__version__}\n"
    data = ModelCard(files["README.md"].decode()).data
    assert (data["sdk"], data["app_file"], data["models"], data["title"]) == ("gradio", "app.py", ["owner/run"], "play")
    launched = []
    monkeypatch.setattr("rim_peft.app.launch", lambda *args, **options: launched.append((args, options)))
    exec(compile(files["app.py"], "app.py", "exec"), {})  # noqa: S102 - what the Space runs
    assert launched == [(("owner/run",), {"revision": "v1"})]
    # Again: the adapter may have moved on.
    assert main(["push", folder, "owner/run", "--space", "owner/play"]) == 0
    exec(compile(hub.files("spaces/owner/play")["app.py"], "app.py", "exec"), {})  # noqa: S102
    assert launched[-1] == (("owner/run",), {})


def test_a_space_needs_whole_ids(
    hub: Hub, trained: tuple[Path, Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo_id, space, message in (
        ("owner/run", "play", "space: must be owner/name on the Hub, got 'play'. Give both."),
        ("run", "owner/play", "repo_id: must be owner/name on the Hub, got 'run'. Give both."),
        ("owner/run", "a/b/c", "space: must be owner/name on the Hub, got 'a/b/c'. Give both."),
    ):
        assert main(["push", str(trained[0]), repo_id, "--space", space]) == 1
        assert message in capsys.readouterr().err
    assert not hub.repos
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(PermissionError, match=r"owner/play: the Hub must let you write there.*\(401\)"):
        push_space("owner/play", "owner/run")
