"""One thing broken at a time in a recipe that works: what stops a training, a check says before it, with the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rim_peft.cli.main import main
from tests.conftest import build_base
from tests.unit.run.test_preflight import ROWS, write_values


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_recipe(folder: Path, base: Path, **sections: Any) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    values: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model": {"name_or_path": str(base)},
        "adapter": {"num_blocks": 2, "r": 4},
        "data": {
            "task": "rim_peft.tasks.logic:ProsQA",
            "path": str(folder / "rows.jsonl"),
            "validation_rows": 2,
            "validation_split": None,
        },
        "evaluation": {"max_new_tokens": 2},
        "grounding": {"per_device_train_batch_size": 4, "max_steps": 1, "save_steps": 1},
        "refinement": None,
    }
    return write_values(folder, values, sections)


def both(capsys: pytest.CaptureFixture[str], path: str, key: str, words: str) -> None:
    """Check names key and words; the training stops with the same words, and has written no checkpoint."""
    capsys.readouterr()
    assert main(["check", path]) == 1
    (found,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{path}: "))
    assert found.startswith(f"{path}: {key}: ")
    assert words in found
    assert main(["train", path]) == 1
    assert words in capsys.readouterr().err
    assert not list(Path(path).parent.glob("out/*/checkpoint-*/adapter_model.safetensors"))


def test_what_trains_is_checked_without_a_word(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, base, grounding={"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    )
    assert main(["check", path]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{path}: ok\n")
    assert "note:" not in captured.out
    assert not (tmp_path / "out").exists()
    assert main(["train", path]) == 0


QUICK = ("MLflowCallback", "<nosuch>", "One of min_lr")


def unless_quick(cases: list[tuple[str, dict[str, Any], str]]) -> list[Any]:
    """Mark the cases that are no kind of their own as slow."""
    slow = pytest.mark.slow
    return [pytest.param(*case, marks=() if any(word in case[2] for word in QUICK) else slow) for case in cases]


@pytest.mark.parametrize(
    ("key", "options", "words"),
    unless_quick(
        [
            ("report_to", {"report_to": "mlflow"}, "MLflowCallback requires mlflow to be installed"),
            ("report_to", {"report_to": "nosuch"}, "nosuch is not supported, only azure_ml"),
            ("eos_token", {"eos_token": "<nosuch>"}, "('<nosuch>') is not found in the vocabulary"),
            ("pad_token", {"pad_token": "<nosuch>"}, "('<nosuch>') is not found in the vocabulary"),
            ("optim", {"optim": "lomo"}, "You need to install `lomo_optim`"),
            ("optim_args", {"optim_args": "nonsense"}, "not enough values to unpack"),
            (
                "lr_scheduler_type",
                {"lr_scheduler_type": "cosine_with_min_lr"},
                "One of min_lr or min_lr_rate should be set",
            ),
            ("lr_scheduler_kwargs", {"lr_scheduler_kwargs": {"nosuch": 1}}, "unexpected keyword argument 'nosuch'"),
            ("save_strategy", {"save_strategy": "best"}, "`args.metric_for_best_model` must be provided"),
            ("save_only_model", {"save_only_model": True}, "must be False, since resuming needs"),
            ("dataloader_persistent_workers", {"dataloader_persistent_workers": True}, "needs num_workers > 0"),
            ("fsdp", {"fsdp": "full_shard"}, "Using fsdp only works in distributed training"),
            (
                "metric_for_best_model",
                {
                    "load_best_model_at_end": True,
                    "eval_strategy": "steps",
                    "eval_steps": 1,
                    "metric_for_best_model": "nosuch",
                },
                "is set to 'eval_nosuch', which is not found in the evaluation metrics",
            ),
        ]
    ),
)
def test_options_of_a_stage(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, key: str, options: dict[str, Any], words: str
) -> None:
    for package in ("mlflow", "lomo_optim"):
        if package in words and find_spec(package) is not None:
            pytest.skip(f"{package} is installed")
    both(
        capsys,
        write_recipe(tmp_path, base, grounding=options),
        f"grounding.{key}",
        words,
    )


@pytest.mark.slow
def test_a_second_stage_is_looked_at_too(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, base, refinement={"report_to": "nosuch", "max_steps": 1})
    assert main(["check", path]) == 1
    assert "refinement.report_to: nosuch is not supported" in capsys.readouterr().err
    both(
        capsys,
        write_recipe(tmp_path, base, refinement={"optim": "sgd", "reset_optimizer": False}),
        "refinement.reset_optimizer",
        "must be True unless",
    )


def test_evaluation_without_rows(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    grounding = {"eval_strategy": "steps", "eval_steps": 1}
    path = write_recipe(tmp_path, base, grounding=grounding, data={"validation_rows": 0})
    both(capsys, path, "grounding.eval_strategy", "but you didn't pass an `eval_dataset`")


def test_trackers_and_optimisers_are_looked_at_without_a_base(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = {"report_to": "nosuch", "eos_token": "<of the base>"}
    path = write_recipe(tmp_path, Path("owner/base"), grounding=options, data={"path": "owner/rows"})
    assert main(["check", path]) == 1
    captured = capsys.readouterr()
    assert "grounding.report_to: nosuch is not supported" in captured.err
    assert "eos_token" not in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("option", ["bf16", "tf32"])
def test_hardware_that_is_not_here(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, option: str) -> None:
    path = write_recipe(tmp_path, base, grounding={option: True})
    assert main(["check", path]) == 0
    assert f"note: grounding.{option}: " in capsys.readouterr().out
    assert main(["check", path, "--device", "cuda"]) == 0
    assert "note:" not in capsys.readouterr().out
    assert main(["check", path, "--device", "cpu"]) == 1
    assert f"{path}: grounding.{option}: " in capsys.readouterr().err


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def point(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    build_base("llama").save_pretrained(folder, max_shard_size="50KB")
    min(folder.glob("model-*.safetensors")).unlink()


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def damage_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:500])


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "model.name_or_path",
            "no file named model.safetensors",
        ),
        (cut, "model.name_or_path", "cannot be read (Error while deserializing header"),
        (point, "model.name_or_path", "cannot be read (Error while deserializing header"),
        (lambda folder: edit(folder, hidden_size=48), "model.name_or_path", "other shapes than its config.json says"),
        (lambda folder: edit(folder, num_hidden_layers=3), "model.name_or_path", "but lack 9, such as model.layers.2."),
        (lose_a_shard, "model.name_or_path", "model-00001-of-0000"),
        (lambda folder: (folder / "config.json").write_text("{"), "model.name_or_path", "is not a valid JSON file"),
        (lose_tokenizer, "model.tokenizer", "okenizer"),
        (damage_pickle, "model.name_or_path", "pytorch_model.bin"),
    ],
    ids=["none", "cut", "pointer", "shape", "layers", "shard", "config", "tokenizer", "pickle"],
)
def test_files_of_a_base(
    capsys: pytest.CaptureFixture[str],
    base: Path,
    tmp_path: Path,
    change: Callable[[Path], Any],
    key: str,
    words: str,
) -> None:
    shutil.copytree(base, tmp_path / "base")
    change(tmp_path / "base")
    both(capsys, write_recipe(tmp_path, tmp_path / "base"), key, words)
    assert main(["train", str(tmp_path / "recipe.yaml"), "resume=true"]) == 1
    assert "weights_only=False" not in capsys.readouterr().err


def as_file(folder: Path) -> str:
    (folder / "out").write_text("x")
    return str(folder / "out")


def below_file(folder: Path) -> str:
    (folder / "file").write_text("x")
    return str(folder / "file" / "out")


def in_use(folder: Path) -> str:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("x")
    return str(folder / "out")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (as_file, "must be a folder"),
        (below_file, "must be a folder"),
        (in_use, "must be new or empty"),
        (lambda folder: str(folder / ("x" * 300)), "File name too long"),
        (lambda folder: "/proc/none/out", "that can be written to"),
    ],
    ids=["file", "below a file", "in use", "long", "read only"],
)
def test_output_folders(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, make: Callable[[Path], str], words: str
) -> None:
    both(capsys, write_recipe(tmp_path, base, output_dir=make(tmp_path)), "output_dir", words)


def test_little_room_is_noted(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("rim_peft.run.output_folder.shutil.disk_usage", lambda folder: usage)
    assert main(["check", write_recipe(tmp_path, base)]) == 0
    assert "note: output_dir: the checkpoints take about 0.0 GiB, 0.0 GiB are free" in capsys.readouterr().out
