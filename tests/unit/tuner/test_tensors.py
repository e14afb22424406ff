"""An adapter's file holds the adapter's tensors, finite, as they were saved, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rim_peft.training.checkpoints import load_weights, save_weights
from rim_peft.tuner.tensors import check_checksum, read_tensors, seal_tensors
from tests.conftest import build_base, build_rim

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NORM = f"{PREFIX}model.norm.weight"
Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that names its base, in a folder beside it."""
    base = build_base()
    base.save_pretrained(tmp_path / "base")
    model = build_rim(base=base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def edit(folder: Path, **tensors: Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS, metadata={"format": "pt"})


def by_peft(folder: Path, base: Any) -> Any:
    return PeftModel.from_pretrained(base, str(folder))


def beside_another(folder: Path, base: Any) -> Any:
    model = getattr(base, "_attached", None) or build_rim(base=base)
    return model.load_adapter(str(folder), "other")


def by_transformers(folder: Path, base: Any) -> Any:
    return base.load_adapter(str(folder))


def in_place(folder: Path, base: Any) -> Any:
    return hotswap_adapter(build_rim(base=base), str(folder), "default", torch_device="cpu")


def as_stage_weights(folder: Path, base: Any) -> Any:
    return load_weights(build_rim(base=base), folder / WEIGHTS)


ROUTES: list[Callable[[Path, Any], Any]] = [by_peft, beside_another, by_transformers, in_place, as_stage_weights]


def weights_of(base: Any) -> dict[str, Tensor]:
    """A base's own tensors, whatever is attached to it."""
    return {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in base.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def check_untouched(base: Any, before: dict[str, Tensor]) -> None:
    after = weights_of(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "name",
    [
        NORM,
        "model.norm.weight",
        f"{PREFIX}lm_head.weight",
        f"{PREFIX}model.embed_tokens.base_layer.weight",
        f"{Q_PROJ}.base_layer.weight",
    ],
)
def test_tensors_of_the_base_are_refused(folder: Path, route: Callable[[Path, Any], Any], name: str) -> None:
    base = build_base()
    before = weights_of(base)
    plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    edit(folder, **{name: torch.zeros_like(before[plain])})
    with pytest.raises(ValueError, match="adapter's file: its tensors must be those of the adapter"):
        route(folder, base)
    check_untouched(base, before)


@pytest.mark.parametrize("route", ROUTES)
def test_every_tensor_of_the_base_at_once(folder: Path, route: Callable[[Path, Any], Any]) -> None:
    base = build_base()
    before = weights_of(base)
    attached = {name for name, _ in build_rim().get_base_model().named_parameters() if ".lora_" not in name}
    edit(folder, **{f"{PREFIX}{name}": torch.randn(3, 3) for name in attached})
    with pytest.raises(ValueError, match=r"got one of the base, base_model\.\S+ \(and \d+ more\)|must be those of the"):
        route(folder, base)
    check_untouched(base, before)


def test_names_of_tensors_are_shown_in_one_line(folder: Path) -> None:
    edit(folder, **{"a\x1b[31m\nb" + "c" * 1000: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"on this base, a\\x1b\[31m bc+ \.\.\. c+ not there") as refused:
        by_peft(folder, build_base())
    assert len(str(refused.value)) < 600


def test_a_copy_of_another_tensor_of_the_base_is_refused_too(folder: Path) -> None:
    base = build_base()
    edit(folder, **{NORM: base.model.norm.weight.detach().clone()})
    with pytest.raises(ValueError, match=r"got one of the base, base_model\.model\.model\.norm\.weight: "):
        by_peft(folder, base)


def test_embeddings_that_peft_saved_are_read_where_they_are_the_bases_own(tmp_path: Path) -> None:
    model = build_rim()
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert f"{PREFIX}lm_head.weight" in load_file(tmp_path / WEIGHTS)
    loaded = by_peft(tmp_path, build_base())
    ids = torch.tensor([[20, 30, 40]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    edit(tmp_path, **{f"{PREFIX}lm_head.weight": torch.zeros_like(model.lm_head.weight)})
    with pytest.raises(ValueError, match=r"got one of the base, base_model\.model\.lm_head\.weight: "):
        by_peft(tmp_path, build_base())


def test_a_base_is_as_it_was_after_a_refusal(folder: Path) -> None:
    edit(folder, **{NORM: torch.zeros(32)})
    ids = torch.tensor([[20, 30, 40]])
    for load in (by_peft, by_transformers):
        base = build_base()
        expected = base.generate(ids, max_new_tokens=5, do_sample=False)
        with pytest.raises(ValueError, match="got one of the base"):
            load(folder, base)
        assert not any("lora" in name for name, _ in base.named_modules())
        assert not hasattr(base, "peft_config")
        assert "generate" not in vars(base)
        assert torch.equal(base.generate(ids, max_new_tokens=5, do_sample=False), expected)
        assert not getattr(base, "_hf_peft_config_loaded", False)


def test_an_adapter_that_is_there_stays_after_a_refusal(folder: Path) -> None:
    native: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[20, 30, 40]])
    expected = native.generate(ids, max_new_tokens=5)
    edit(folder, **{NORM: torch.zeros(32)})
    with pytest.raises(ValueError, match="got one of the base"):
        native.load_adapter(str(folder), "other")
    assert list(native.peft_config) == ["default"]
    assert torch.equal(native.generate(ids, max_new_tokens=5), expected)


def test_transformers_reads_no_pickle_in_place_of_the_file_that_was_checked(folder: Path) -> None:
    torch.save({NORM: torch.zeros(32)}, folder / "adapter_model.bin")
    base = build_base()
    before = weights_of(base)
    with pytest.raises(ValueError, match="use_safetensors: must not be False"):
        base.load_adapter(str(folder), use_safetensors=False)
    check_untouched(base, before)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle"):
        base.load_adapter(str(folder))


@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_modules_in_full_are_the_adapters_where_its_configuration_says_so(
    tmp_path: Path, load: Callable[[Path, Any], Any]
) -> None:
    model = build_rim(modules_to_save=["norm"])
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    base = build_base()
    loaded = load(tmp_path, base)
    loaded = base if load is by_transformers else loaded
    ids = torch.tensor([[20, 30, 40]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    kept = load_file(tmp_path / WEIGHTS)
    del kept[NORM]
    save_file(kept, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must describe an adapter of this base|its tensors must be those of the"):
        load(tmp_path, build_base())


@pytest.mark.parametrize("trained", [False, True])
def test_a_head_in_full_is_read_where_it_equals_what_is_there(tmp_path: Path, trained: bool) -> None:
    model = build_rim(modules_to_save=["lm_head"])
    if trained:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(str(tmp_path))
    loaded = by_peft(tmp_path, build_base())
    ids = torch.tensor([[20, 30, 40]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(model))  # once more, as best weights may be the last


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.index_fill(0, torch.tensor([1]), torch.nan), "must be finite, got NaN or infinity:"),
        (lambda tensor: tensor.fill_(-torch.inf), "must be finite, got NaN or infinity:"),
        (lambda tensor: tensor.to(torch.int32), "must be float32, bfloat16 or float16, got int32 in"),
        (lambda tensor: tensor.to(torch.complex64), "must be float32, bfloat16 or float16, got complex64 in"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "must be float32, bfloat16 or float16, got float8_e4m3fn in"),
    ],
    ids=["nan", "infinity", "int32", "complex64", "float8"],
)
def test_values_that_are_no_weights(
    folder: Path, route: Callable[[Path, Any], Any], change: Callable[[Tensor], Tensor], message: str
) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    edit(folder, **{name: change(load_file(folder / WEIGHTS)[name])})
    with pytest.raises(ValueError, match=f"{message} base_model.model.model.layers.0.self_attn.q_proj.lora_A"):
        route(folder, build_base())


@pytest.mark.parametrize("route", ROUTES)
def test_values_that_are_finite_in_the_file_alone(folder: Path, route: Callable[[Path, Any], Any]) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    edit(folder, **{name: load_file(folder / WEIGHTS)[name].double() * 1e300})
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity: .*q_proj\.lora_A.* holds -?inf"):
        route(folder, build_base())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_half_types_are_weights(folder: Path, route: Callable[[Path, Any], Any], dtype: torch.dtype) -> None:
    edit(folder, **{name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()})
    route(folder, build_base())


def bits(path: Path) -> Iterator[int]:
    """Places of a file's data, from the first tensor to the last."""
    size = path.stat().st_size
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    yield from range(start, size, (size - start) // 5)


@pytest.mark.parametrize("route", ROUTES)
def test_flipped_bits_are_found(folder: Path, route: Callable[[Path, Any], Any]) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for place in bits(path):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: must be as it was saved, but its checksum"):
            route(folder, build_base())
    path.write_bytes(whole)
    route(folder, build_base())


def test_files_without_a_checksum_are_read(folder: Path) -> None:
    edit(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for route in ROUTES:
        route(folder, build_base())


def test_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    model = build_rim()
    for name in ("a", "b"):
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        save_weights(model, tmp_path / name / "best.safetensors", best={"step": 1})
    for name in (WEIGHTS, "best.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    header = (tmp_path / "a" / "best.safetensors").read_bytes()[8:].partition(b"}")[0].decode()
    assert header.startswith('{"__metadata__":{"best":')
    # Whatever order metadata come in, the order in the file is that of their names.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contents = set()
    for keys in (["x", "y", "z", "format"], ["format", "z", "y", "x"]):
        save_file(tensors, tmp_path / "c", metadata=dict.fromkeys(keys, "pt"))
        seal_tensors(tmp_path / "c")
        contents.add((tmp_path / "c").read_bytes())
    assert len(contents) == 1


def test_a_sealed_file_is_read_as_before(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    path = tmp_path / "plain.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    seal_tensors(path)
    sealed = read_tensors(path)
    assert sealed.keys() == tensors.keys()
    assert all(
        torch.equal(sealed[name], tensor) and sealed[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    seal_tensors(path)  # again: the same checksum
    check_checksum(path)
    first = path.read_bytes()
    seal_tensors(path)
    assert path.read_bytes() == first


def test_adapters_of_other_kinds_are_pefts_own_matter(tmp_path: Path) -> None:
    model = get_peft_model(build_base(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path))
    edit(tmp_path, **{NORM: torch.full((32,), 2.0)})
    base = build_base()
    PeftModel.from_pretrained(base, str(tmp_path))
    assert float(base.model.norm.weight[0]) == 2
