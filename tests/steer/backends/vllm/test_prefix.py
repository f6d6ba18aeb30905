"""Keys of prefix caches: one function per process, however many engines it has had."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

from steer.backends.vllm import prefix
from steer.backends.vllm.engine import Core, Front
from steer.backends.vllm.library import Library
from steer.backends.vllm.request import Asked
from tests.steer.backends.vllm.made import declared, stored


def cache_utils(monkeypatch) -> ModuleType:
    """vLLM's module, and another that imported its function by name."""
    utils, pool = ModuleType("vllm.v1.core.kv_cache_utils"), ModuleType("vllm.v1.core.block_pool")

    def generate(request, start, end, mm):
        return (("lora", "x"),) if request.lora else None, mm

    for module in (utils, pool):
        setattr(module, prefix.NAME, generate)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm", "vllm.v1", "vllm.v1.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.v1.core"].kv_cache_utils = utils
    monkeypatch.setattr(prefix, "_installed", None)
    return pool


def resolved(folder, name: str, lora: bool = False) -> SimpleNamespace:
    bases = stored(folder)
    params = SimpleNamespace(extra_args=Asked(name, bases[name]).to_args(), skip_reading_prefix_cache=None)
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=[5] * 6, prompt_embeds=None, resumable=False)
    Front(declared(folder), False).resolve(request)
    Core(Library(declared(folder))).admit(request)
    return SimpleNamespace(sampling_params=params, lora=lora)


def test_a_second_engine_in_a_process_keys_its_own_requests_alone(tmp_path, monkeypatch):
    pool = cache_utils(monkeypatch)
    prefix.install()
    first = resolved(tmp_path / "first", "all")
    told = pool.generate_block_hash_extra_keys(first, 0, 4, 0)
    for path in sorted((tmp_path / "first").rglob("*"), reverse=True):  # The first engine is gone, its store too.
        path.rmdir() if path.is_dir() else path.unlink()
    prefix.install()
    second = resolved(tmp_path / "second", "all", lora=True)
    keys, at = pool.generate_block_hash_extra_keys(second, 0, 4, 7)
    assert at == 7 and keys == (("lora", "x"), *told[0]) and len(told[0]) == 1


def test_requests_without_steering_have_the_keys_that_vllm_gives_them(monkeypatch):
    pool = cache_utils(monkeypatch)
    prefix.install()
    for params in (None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"other": 1})):
        assert pool.generate_block_hash_extra_keys(SimpleNamespace(sampling_params=params, lora=False), 0, 4, 2) == (None, 2)  # fmt: skip
