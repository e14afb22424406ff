import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import eva

from rim_peft import RiMConfig, RiMModel
from rim_peft.tuner import MemoryEmbedding
from rim_peft.tuner.peft_plugin import RIM, _add_member, override, register
from tests.conftest import build_base, build_rim


def test_rim_is_a_member_like_any_other() -> None:
    assert isinstance(RIM, PeftType)
    assert RIM == "RIM"
    assert RIM.name == RIM.value == "RIM"
    assert PeftType("RIM") is PeftType["RIM"] is RIM
    assert PeftType.__members__["RIM"] is RIM
    assert getattr(PeftType, "RIM") is RIM  # noqa: B009 - mypy does not know the attribute
    assert list(PeftType).count(RIM) == 1
    assert RIM in PeftType
    assert "RIM" in list(PeftType)
    assert hash(RIM) == hash(PeftType("RIM"))
    assert {RIM: 1}["RIM"] == 1
    assert RIM != PeftType.LORA


def test_rim_survives_copy_pickle_and_json() -> None:
    assert copy.deepcopy(RIM) is RIM
    assert pickle.loads(pickle.dumps(RIM)) is RIM  # noqa: S301
    assert json.loads(json.dumps({"peft_type": RIM})) == {"peft_type": "RIM"}


def test_registering_twice_changes_nothing() -> None:
    before, unsupported = list(PeftType), eva.UNSUPPORTED_LORA_MODULES
    assert _add_member() is RIM
    register(RiMConfig, RiMModel, MemoryEmbedding)
    assert list(PeftType) == before
    assert unsupported == eva.UNSUPPORTED_LORA_MODULES
    assert unsupported.count(MemoryEmbedding) == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[RIM] is RiMConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[RIM] is RiMModel


def test_a_rim_of_pefts_own_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class PeftsOwn(RiMConfig):
        pass

    PeftsOwn.__module__ = "peft.tuners.rim.config"
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, RIM, PeftsOwn)
    with pytest.raises(ImportError, match="has its own method named RIM"):
        register(RiMConfig, RiMModel, MemoryEmbedding)


def test_methods_are_overridden_for_rim_alone_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = vars(PeftModel)["get_nb_trainable_parameters"]
    monkeypatch.setattr(PeftModel, "get_nb_trainable_parameters", before)  # restored at the end
    calls = []

    def count(model: PeftModel, original: Any) -> Any:
        calls.append(original)
        return original(model)

    for _ in range(2):
        override(RiMModel, get_nb_trainable_parameters=count)
    lora = get_peft_model(build_base(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert lora.get_nb_trainable_parameters()[0] > 0
    assert not calls
    assert build_rim().get_nb_trainable_parameters()[0] > 0
    assert calls == [before]


def test_importing_the_package_registers_and_leaves_trl_out() -> None:
    code = (
        "import sys, rim_peft, peft; assert peft.PeftType('RIM') == 'RIM'; assert 'trl' not in sys.modules; "
        "print(rim_peft.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip()
