import sys
import types

from rim_peft.data.caching import source_hash


def test_the_hash_is_that_of_the_modules_sources() -> None:
    assert source_hash(__name__) == source_hash(__name__)
    assert source_hash(__name__) != source_hash("rim_peft.data.caching")
    assert source_hash(__name__, "rim_peft.data.caching") != source_hash(__name__)


def test_a_module_without_source_counts_by_name() -> None:
    for name in ("typed_in_a", "typed_in_b"):
        sys.modules[name] = types.ModuleType(name)
    assert source_hash("typed_in_a") != source_hash("typed_in_b")
    del sys.modules["typed_in_a"], sys.modules["typed_in_b"]
