"""Folders of adapters, changed in every way that a copy, a disk, an editor or a stranger may change them.

An answer must be the original's, or the folder is refused, and the base stays as it was. Three folders are changed: of
a run, whose record lists its files; of an adapter that was saved by hand, with its tokenizer; and of one as the first
versions saved them, which say less and have no checksum. What nothing can tell from an adapter that somebody meant so
(another tokenizer of its own, other finite weights without a checksum) may change answers, and must load or be refused.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from safetensors.torch import load, load_file, save
from torch import Tensor

from rim_peft.recipe import load_recipe
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run import load_run
from rim_peft.run.loading import describe_asking
from rim_peft.run.output_folder import listed_files
from rim_peft.tuner.files import file_digests
from tests.conftest import VOCAB_SIZE, build_base, build_rim, build_tokenizer
from tests.robustness.judging import Case

CONFIG, WEIGHTS, RECIPE, RECORD = "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "run.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
NAMES = (
    CONFIG,
    WEIGHTS,
    RECIPE,
    RECORD,
    "tokenizer",
    "adapter's file",
    "memory rows",
    "base_architecture",
    "the adapter",
)
PREFIX = "base_model.model."

_IDS = torch.tensor([[20, 30, VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 1, VOCAB_SIZE + 2]])
_TEXT = "What is 7 + 8? <eos>"

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1.5, 10**30, float("nan"), "", "x", "None", "q_proj", "*", "x" * 5000, [], [None],
    [0], ["q_proj"], [[]], {}, {"x": 1}, {"q_proj": 2}, {"q_proj": "x"}, {"": None}, [1, "a", {}],
)  # fmt: skip

_FREE_TO_CHANGE = {
    "num_blocks",
    "block_size",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "insertion_layer",
    "bidirectional_blocks",
}
"""Options of files without notes on them that are what somebody may have trained with."""


@dataclass(frozen=True)
class _Change:
    """What is done to a folder.

    Attributes:
        name: what it is, for the report.
        files: new contents by file; None for a file that goes.
        is_free: whether it may be another adapter that somebody meant so.
    """

    name: str
    files: dict[str, bytes | None]
    is_free: bool = False


@dataclass
class _Folder:
    """A folder with an adapter, its whole files, and what a load of it gives."""

    kind: str
    path: Path
    files: dict[str, bytes]
    others: dict[str, bytes]
    answer: Any = None

    def write(self, files: dict[str, bytes | None]) -> None:
        for name, content in files.items():
            if content is None:
                (self.path / name).unlink(missing_ok=True)
            else:
                (self.path / name).write_bytes(content)

    def restore(self, files: dict[str, bytes | None]) -> None:
        self.write({name: self.files.get(name) for name in files})


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield changed folders without end."""
    rng = random.Random(seed)
    base = build_base()
    whole = {name: parameter.detach().clone() for name, parameter in base.state_dict().items()}
    folders = [_build(kind, folder) for kind in ("run", "hand", "old")]
    for each in folders:
        _load(each, base, by_run=True, keep=True)
    number = 0
    while True:
        each = rng.choice(folders)
        change = rng.choice(_CHANGES)(rng, each)
        by_run = rng.random() < 0.5 or any(name != WEIGHTS for name in change.files)
        yield _case(f"{number} {each.kind}: {change.name}", each, change, base, whole, by_run=by_run)
        number += 1


def _case(name: str, folder: _Folder, change: _Change, base: Any, whole: dict[str, Tensor], *, by_run: bool) -> Case:
    def run() -> str | None:
        folder.write(change.files)
        try:
            complaint = _load(folder, base, by_run=by_run, is_free=change.is_free)
        finally:
            folder.restore(change.files)
            touched = _touched(base, whole)
        if touched:
            raise AssertionError(touched)
        return complaint

    return Case(f"{name} ({'load_run' if by_run else 'PeftModel'})", run, NAMES)


def _load(folder: _Folder, base: Any, *, by_run: bool, is_free: bool = False, keep: bool = False) -> str | None:
    """Load a folder onto the base, ask it, and take it off again."""
    with warnings.catch_warnings(), mock.patch("rim_peft.run.loading.load_base", return_value=base):
        warnings.simplefilter("ignore")
        run = load_run(folder.path) if by_run else None
        model: Any = run.model if run is not None else PeftModel.from_pretrained(base, str(folder.path))
    try:
        with torch.no_grad():
            answer: dict[str, Any] = {"logits": model(input_ids=_IDS).logits}
            if not is_free:
                answer["blocks"] = model.generate(_IDS[:, :2], max_new_tokens=2, do_sample=False)
        if run is not None and not is_free:
            answer["tokens"] = run.tokenizer(_TEXT)["input_ids"]
            answer["templates"] = asdict(run.templates)
    finally:
        model.unload()
    if keep:
        folder.answer = answer
    if is_free:
        return None
    return next((f"other {name}" for name, value in answer.items() if not _is_equal(value, folder.answer[name])), None)


def _is_equal(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


def _touched(base: Any, whole: dict[str, Tensor]) -> str | None:
    state = base.state_dict()
    if state.keys() != whole.keys():
        return f"the base has other tensors: {sorted(state.keys() ^ whole.keys())[:3]}"
    changed = [name for name, value in whole.items() if not torch.equal(state[name], value)]
    if changed:
        return f"the base was changed: {changed[:3]}"
    return "the base keeps the adapter's generate" if "generate" in vars(base) else None


def _build(kind: str, parent: Path) -> _Folder:
    """Save an adapter, and another one of the same shapes, whose files are swapped in."""
    path, other = parent / kind, parent / f"{kind}-other"
    _save(path, kind, seed=1, template="Q: {question}\n")
    _save(other, kind, seed=2, template="Ask: {question}\n", num_blocks=3, lora_alpha=16)
    files = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    return _Folder(kind, path, files, {entry.name: entry.read_bytes() for entry in other.iterdir()})


def _save(path: Path, kind: str, *, seed: int, template: str, **options: Any) -> None:
    model = build_rim(target_modules=["q_proj", "down_proj"], **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(path), save_embedding_layers=False)
    config = json.loads((path / CONFIG).read_text())
    config["base_model_name_or_path"] = "base"
    if kind == "old":
        del config["format_version"], config["base_architecture"]
        (path / WEIGHTS).write_bytes(save(load_file(path / WEIGHTS), metadata={"format": "pt"}))
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    (path / "README.md").unlink()
    build_tokenizer().save_pretrained(path)
    if kind == "run":
        overrides = ["model.name_or_path=base", f"data.prompt_template={json.dumps(template)}", "output_dir=out"]
        recipe = load_recipe(Path(__file__).parents[2] / "rim_peft" / "demo" / "recipe.yaml", overrides, check=False)
        (path / RECIPE).write_text(write_yaml(resolve(recipe)))
        files = file_digests(path, listed_files(path))
        record = {"seed": seed, "metrics": {}, "asked": describe_asking(recipe), "files": files}
        (path / RECORD).write_text(json.dumps(record, indent=2))


# What is done to files of any kind.


def _gone(rng: random.Random, folder: _Folder) -> _Change:
    name = rng.choice(sorted(folder.files))
    is_free = folder.kind != "run" and name not in (CONFIG, WEIGHTS)
    return _Change(f"{name} gone", {name: None}, is_free=is_free)


def _cut(rng: random.Random, folder: _Folder) -> _Change:
    name = rng.choice([name for name in sorted(folder.files) if name != RECIPE])
    kept = rng.choice([0, 1, 8, rng.randrange(len(folder.files[name]))])
    is_free = folder.kind != "run" and name not in (CONFIG, WEIGHTS)
    return _Change(f"{name} cut at {kept}", {name: folder.files[name][:kept]}, is_free=is_free)


def _flipped(rng: random.Random, folder: _Folder) -> _Change:
    name = rng.choice([name for name in sorted(folder.files) if name not in (RECIPE, "chat_template.jinja")])
    content = bytearray(folder.files[name])
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    is_free = (folder.kind == "old" and name in (CONFIG, WEIGHTS)) or (folder.kind != "run" and name in TOKENIZER)
    return _Change(f"{name} bit {bit} of byte {place}", {name: bytes(content)}, is_free=is_free)


def _something_else(rng: random.Random, folder: _Folder) -> _Change:
    name = rng.choice([name for name in sorted(folder.files) if name != RECIPE])
    content = rng.choice(
        [b"", b"null", b"[]", b"{}", b"5", b'"text"', b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n",
         b"[" * 100_000, b'{"a":' * 100_000, rng.randbytes(300), b'{"peft_type": "RIM"}', b"1" * 10_000]
    )  # fmt: skip
    is_free = folder.kind != "run" and name not in (CONFIG, WEIGHTS)
    return _Change(f"{name} is {content[:12]!r}", {name: content}, is_free=is_free)


def _of_another(rng: random.Random, folder: _Folder) -> _Change:
    name = rng.choice([name for name in sorted(folder.files) if folder.files[name] != folder.others[name]])
    return _Change(f"{name} of another", {name: folder.others[name]}, is_free=folder.kind == "old")


# What is done to JSON.


def _json_name(rng: random.Random, folder: _Folder) -> str:
    names = [CONFIG, CONFIG, CONFIG, *(name for name in (*TOKENIZER, RECORD) if name in folder.files)]
    return rng.choice(names)


def _place(rng: random.Random, document: Any) -> tuple[Any, Any]:
    """A container within a document, and a key of it."""
    while True:
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = rng.choice(keys)
        if isinstance(document[key], dict | list) and document[key] and rng.random() < 0.6:
            document = document[key]
            continue
        return document, key


def _edited(name: str, folder: _Folder, what: str, document: Any, key: Any) -> _Change:
    is_own = folder.kind != "run" and name in TOKENIZER
    is_free = is_own or (folder.kind == "old" and (key in _FREE_TO_CHANGE or not isinstance(key, str)))
    return _Change(f"{name} {what}", {name: json.dumps(document).encode()}, is_free=is_free)


def _key_gone(rng: random.Random, folder: _Folder) -> _Change:
    name = _json_name(rng, folder)
    document = json.loads(folder.files[name])
    container, key = _place(rng, document)
    del container[key]
    return _edited(name, folder, f"without {key}", document, key)


def _value_changed(rng: random.Random, folder: _Folder) -> _Change:
    name = _json_name(rng, folder)
    document = json.loads(folder.files[name])
    container, key = _place(rng, document)
    old = container[key]
    nearby = [old + 1, old * 2] if type(old) is int else [f"{old}x", old[:-1]] if isinstance(old, str) else []
    container[key] = value = rng.choice([*_VALUES, *nearby, *nearby, *nearby])
    return _edited(name, folder, f"{key}={str(value)[:40]!r}", document, key)


def _key_added(rng: random.Random, folder: _Folder) -> _Change:
    name = _json_name(rng, folder)
    document = json.loads(folder.files[name])
    document[rng.choice(["unknown", "x" * 3000, "", "runtime_config", "subfolder", "auto_map"])] = rng.choice(_VALUES)
    return _edited(name, folder, "with one key more", document, "")


# What is done to tensors.


def _tensors(
    change: Callable[[random.Random, dict[str, Tensor], str], dict[str, Tensor]], *, is_value: bool = False
) -> Callable[[random.Random, _Folder], _Change]:
    def apply(rng: random.Random, folder: _Folder) -> _Change:
        tensors = load(folder.files[WEIGHTS])
        name = rng.choice(sorted(tensors))
        changed = change(rng, dict(tensors), name)
        content = save(changed, metadata={"format": "pt"})  # without a checksum, as a stranger would
        return _Change(f"{change.__name__.strip('_')} {name}", {WEIGHTS: content}, is_free=is_value)

    return apply


def _renamed(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    new = rng.choice(
        [f"{name}.weight", name.removeprefix(PREFIX), name.replace("layers.0", "layers.1"), "", "x" * 3000,
         name.replace("lora_A", "lora_B"), name.replace(".lora_", ".base_layer."), name.upper(), f"{name}\x00",
         name.replace("q_proj", "k_proj")]
    )  # fmt: skip
    tensors[new] = tensors.pop(name)
    return tensors


def _one_of_the_base(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    base = build_base().state_dict()
    for own in rng.sample(sorted(base), rng.choice([1, 1, 3, len(base)])):
        spelt = rng.choice([own, f"{PREFIX}{own}", f"{PREFIX}{own}".replace(".weight", ".base_layer.weight")])
        tensors[spelt] = torch.randn_like(base[own])
    return tensors


def _one_more(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    more = rng.choice(
        ["x", f"{PREFIX}x.lora_A.weight", name.replace(".weight", ".default.weight"), f"{PREFIX}lora_.weight"]
    )
    return {**tensors, more: torch.zeros(2)}


def _without(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    for gone in rng.choice([[name], sorted(tensors)]):
        del tensors[gone]
    return tensors


def _reshaped(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    tensor = tensors[name]
    tensors[name] = rng.choice([tensor[:-1], tensor.T, tensor.flatten(), tensor[None], tensor[:0]]).contiguous()
    return tensors


def _retyped(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    dtype = rng.choice(
        [torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64]
    )
    tensors[name] = tensors[name].to(dtype)
    return tensors


def _not_finite(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    flat = tensors[name].flatten()
    flat[rng.randrange(len(flat))] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return tensors


def _rounded(rng: random.Random, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    tensors[name] = tensors[name].to(rng.choice([torch.float16, torch.bfloat16, torch.float64]))
    return tensors


def _copied(rng: random.Random, folder: _Folder) -> _Change:
    return _Change("copied as it is", {WEIGHTS: folder.files[WEIGHTS]})


_CHANGES: tuple[Callable[[random.Random, _Folder], _Change], ...] = (
    _gone, _cut, _flipped, _flipped, _something_else, _of_another, _key_gone, _value_changed, _value_changed,
    _key_added,
    _tensors(_renamed), _tensors(_one_of_the_base), _tensors(_one_more), _tensors(_without), _tensors(_reshaped),
    _tensors(_retyped), _tensors(_not_finite), _tensors(_rounded, is_value=True), _copied,
)  # fmt: skip
