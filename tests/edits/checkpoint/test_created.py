"""Tensors that the base lacks, another dtype, other keys of config.json: loaded by transformers, and taken back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import steer
from edits.checkpoint import plan, revert
from edits.checkpoint.created import changed_config, dtype_changes
from steer.anatomy.headers import read_headers
from steer.anatomy.slots import Matrix
from steer.errors import SteerError
from steer.operations import AddBias, AddDense, ProjectColumns, Scale
from steer.patches import Patch
from tests.edits.material import HIDDEN, contents, patch

Folder = Callable[..., Path]
TOKENS = torch.tensor([[3, 9, 11, 20, 14]])


def logits(folder: Path | str, **options: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("word", ["attention_output", "mlp_output"])
def test_a_bias_that_was_not_there_is_made_with_its_companions(
    tiny_folder: Folder, tmp_path: Path, word: str, shard: str
) -> None:
    base = tiny_folder("llama", max_shard_size=shard, attention_bias=False, mlp_bias=False)
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    made = plan(Patch((AddBias(1, word, vector, 2.0),)), base)
    stems = (
        ["q_proj", "k_proj", "v_proj", "o_proj"]
        if word == "attention_output"
        else ["gate_proj", "up_proj", "down_proj"]
    )
    assert sorted({tensor.name.split(".")[-2] for tensor in made.created}) == sorted(stems)
    assert len(made.created) == 4 * len(stems) and "made new" in str(made)
    done = made.apply(tmp_path / "out")
    config = json.loads((done.path / "config.json").read_text())
    key = "attention_bias" if word == "attention_output" else "mlp_bias"
    assert config[key] is True and {**config, key: False} == json.loads((base / "config.json").read_text())
    plain, loaded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, done))
    report = AutoModelForCausalLM.from_pretrained(done, output_loading_info=True)[1]
    assert not report["missing_keys"] and not report["unexpected_keys"]
    path = f"model.layers.1.{'self_attn.o_proj' if word == 'attention_output' else 'mlp.down_proj'}"
    assert torch.equal(loaded.get_parameter(f"{path}.bias"), 2 * vector)
    others = [p for name, p in loaded.named_parameters() if name.endswith("bias") and name != f"{path}.bias"]
    assert others and not any(bool(p.any()) for p in others)
    handle = plain.get_submodule(path).register_forward_hook(lambda module, inputs, output: output + 2 * vector)
    with torch.no_grad():
        expected = plain(TOKENS).logits
    handle.remove()
    assert torch.allclose(logits(done), expected, atol=1e-5) and not torch.allclose(logits(base), expected, atol=1e-2)
    names = set(read_headers(done.path).tensors) - set(read_headers(base).tensors)
    assert names == {tensor.name for tensor in made.created}
    if shard == "60KB":
        index = json.loads((done.path / "model.safetensors.index.json").read_text())
        assert names <= set(index["weight_map"])
        assert index["metadata"]["total_size"] == read_headers(done.path).bytes
    assert contents(revert(done)) == contents(base)


def test_a_family_that_loads_no_such_bias_is_refused(tiny_folder: Folder) -> None:
    for family, word in (("gemma2", "mlp_output"), ("qwen2", "attention_output")):
        with pytest.raises(SteerError, match=r"no .*bias") as caught:
            plan(Patch((AddBias(0, word, torch.ones(HIDDEN)),)), tiny_folder(family))
        assert "hook" in str(caught.value)


@pytest.mark.parametrize("keep_undo", [False, True])
def test_an_untied_head_stays_as_the_embedding_was(tiny_folder: Folder, tmp_path: Path, keep_undo: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("qwen2", dtype=torch.bfloat16, max_shard_size="60KB"), base)
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    change = Patch((ProjectColumns(-1, "embedding", None, vector), Scale(Matrix(-1, "head"), 0.5)))
    with pytest.raises(SteerError, match="untie"):
        plan(change, base)
    done = plan(change, base, untie=True).apply(tmp_path / "out", keep_undo=keep_undo)
    before, after = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(done)
    assert after.config.tie_word_embeddings is False
    old = before.get_input_embeddings().weight.double()
    unit = vector.double() / vector.double().norm()
    assert torch.equal(after.get_output_embeddings().weight.double(), 0.5 * old)
    expected = (old - torch.outer(old @ unit, unit)).bfloat16()
    assert torch.equal(after.get_input_embeddings().weight, expected)
    assert done.manifest.config == {"tie_word_embeddings": False}
    original = contents(base)
    if keep_undo:
        shutil.rmtree(base)
    assert contents(revert(done)) == original
    with pytest.raises(SteerError, match="of its own"):
        plan(change, tiny_folder("qwen3"), untie=True)


def test_a_dense_difference_of_a_tied_embedding_is_meant_for_both(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("qwen2")
    shape = read_headers(base).tensors["model.embed_tokens.weight"].shape
    done = plan(Patch((AddDense(Matrix(-1, "embedding"), torch.ones(shape[1], shape[0])),)), base).apply(
        tmp_path / "out"
    )
    model = AutoModelForCausalLM.from_pretrained(done)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_undo", [False, True])
def test_float32_output_keeps_a_change_that_bf16_loses(
    tiny_folder: Folder, tmp_path: Path, dtype: torch.dtype, keep_undo: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("qwen3", dtype=dtype, max_shard_size="60KB"), base)
    small = patch(weight=1e-3)
    narrow = plan(small, base).apply(tmp_path / "narrow")
    made = plan(small, base, dtype="float32")
    done = made.apply(tmp_path / "wide", keep_undo=keep_undo)
    assert all(abs((each.survived or 0) - 1) < 1e-4 and (each.cosine or 0) > 0.9999 for each in done.manifest.edited)
    assert min(each.cosine or 0 for each in narrow.manifest.edited) < 0.95
    assert {entry.dtype for entry in read_headers(done.path).tensors.values()} == {"F32"}
    config = json.loads((done.path / "config.json").read_text())
    assert [config[key] for key in ("dtype", "torch_dtype") if key in config] == ["float32"]
    assert AutoModelForCausalLM.from_pretrained(done).dtype == torch.float32
    exact = steer.load(base, dtype=torch.float32, self_check=False)
    with small.on(exact):
        for name, tensor in AutoModelForCausalLM.from_pretrained(done).state_dict().items():
            assert torch.equal(tensor, exact.hf.state_dict()[name]), name
    with safe_open(next(done.path.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    sizes = sum(path.stat().st_size for path in done.path.glob("*.safetensors"))
    assert abs(made.bytes_to_write - sum(f.bytes for f in done.manifest.files)) < 0.02 * sizes
    original = contents(base)
    if keep_undo:
        shutil.rmtree(base)
    assert contents(revert(done)) == original


def test_only_float32_can_be_asked_for(tiny_folder: Folder) -> None:
    with pytest.raises(SteerError, match="float32"):
        plan(patch(), tiny_folder("llama"), dtype="float16")


def test_a_configuration_can_be_set_alone_and_comes_back(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama", max_shard_size="60KB")
    change = Patch((), config={"rope_parameters.rope_theta": 5e5, "use_cache": False})
    made = plan(change, base)
    assert made.coverage == "configuration alone" and "rope_theta = 500000.0" in str(made)
    done = made.apply(tmp_path / "out")
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (done.path, base))
    assert config["rope_parameters"]["rope_theta"] == 5e5 and config["use_cache"] is False
    config["rope_parameters"]["rope_theta"] = old["rope_parameters"]["rope_theta"]
    assert config | {"use_cache": old["use_cache"]} == old
    assert contents(revert(done)) == contents(base)


def test_dotted_keys() -> None:
    assert changed_config({"a": {"b": 1}, "c": 2}, {"a.b": 3, "d.e": 4}) == {"a": {"b": 3}, "c": 2, "d": {"e": 4}}
    with pytest.raises(SteerError, match="no object"):
        changed_config({"c": 2}, {"c.d": 1})
    nested = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": 1}, "quantization": {"dtype": 3}}
    assert dtype_changes(nested, "float32") == {"torch_dtype": "float32", "text_config.dtype": "float32"}
    assert dtype_changes({}, "float32") == {"dtype": "float32"}


def test_a_tied_head_that_is_stored_all_the_same(tiny_folder: Folder, tmp_path: Path) -> None:
    """Transformers ignores it; untying takes it where it is the embedding, and refuses other numbers."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("qwen2"), base)
    weights = load_file(base / "model.safetensors")
    change = Patch((ProjectColumns(-1, "embedding", None, torch.ones(HIDDEN)),))
    for number, equal in enumerate((True, False)):
        head = weights["model.embed_tokens.weight"].clone() + (0 if equal else 1)
        save_file(weights | {"lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
        made = plan(change, base, untie=True)
        if equal:
            done = made.apply(tmp_path / str(number))
            assert torch.equal(AutoModelForCausalLM.from_pretrained(done).get_output_embeddings().weight, head)
            assert contents(revert(done)) == contents(base)
        else:
            with pytest.raises(SteerError, match="other numbers"):
                made.apply(tmp_path / str(number))
