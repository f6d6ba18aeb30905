"""Loading: where models come from, what is refused before a weight is read, and what a loaded model knows of itself."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import steer
from steer import SteerError, loading, sources
from steer.identity import UNKNOWN
from steer.sources import locate, organisms
from tests.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_every_family_loads_as_it_was_saved(tiny, tiny_folder, family):
    folder = tiny_folder(family)
    model = steer.load(folder)
    hf, _ = tiny(family)
    ids = [[3, 14, 15, 9]]
    torch.testing.assert_close(model.run(ids)[0], steer.wrap(hf).run(ids)[0], rtol=1e-6, atol=1e-6)
    assert model.path == folder and model.name == str(folder) and model.card is None
    assert model.marks.exist and model.identity.weights_id != UNKNOWN and not model.hf.training


@pytest.mark.parametrize(
    ("saved", "asked", "found"),
    [("bfloat16", None, "bfloat16"), ("float32", None, "float32"), ("bfloat16", "float32", "float32")],
)
def test_the_dtype_is_the_checkpoints_unless_asked(tiny_folder, saved, asked, found):
    folder = tiny_folder("llama", dtype=getattr(torch, saved))
    assert steer.load(folder, dtype=asked and getattr(torch, asked)).dtype == getattr(torch, found)


def test_sharded_folders_load(tiny_folder):
    folder = tiny_folder("qwen3", max_shard_size="40KB")
    whole = tiny_folder("qwen3")
    assert len(list(folder.glob("*.safetensors"))) > 3
    ids = [[3, 14, 15]]
    assert torch.equal(steer.load(folder).run(ids)[0], steer.load(whole).run(ids)[0])


def test_the_organism_loads_in_float32_with_its_card():
    assert "chain" in organisms()
    model = steer.load("organism:chain")
    assert model.dtype == torch.float32 and model.card is not None and model.card["name"] == "chain"
    assert model.marks.exist and model.name == "organism:chain" and model.path == sources.BUILTIN / "chain"
    assert model.identity.weights_id != UNKNOWN


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("organism:chian", r"no organism 'chian'.*chain"),
        ("organism:../builtin/chain", "no organism"),
        ("./nowhere", "neither a folder nor a hub id"),
        ("/nowhere/at/all", "neither a folder"),
        ("~/nowhere-at-all", "neither a folder"),
        ("a/b/c", "neither a folder"),
        ("nowhere", "neither a folder nor a hub id"),
    ],
)
def test_names_that_lead_nowhere(name, words):
    with pytest.raises(SteerError, match=words):
        locate(name)


def test_a_file_is_no_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(SteerError, match="is a file"):
        locate(str(path))


def test_a_hub_id_that_is_not_cached_says_so_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SteerError) as caught:
        locate("someone/a-model-nobody-has")
    text = str(caught.value)
    assert "HF_HUB_OFFLINE is set" in text and "organism:chain" in text and "\n" not in text


def test_a_hub_id_that_is_cached_is_found_offline(tmp_path, monkeypatch, tiny_folder):
    import huggingface_hub

    snapshot = tmp_path / "snapshot"
    shutil.copytree(tiny_folder("llama"), snapshot)
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = steer.load("someone/tiny-llama")
    assert model.path == snapshot and model.name == "someone/tiny-llama"
    assert (
        "*.bin" not in asked["someone/tiny-llama"]["allow_patterns"]
        and "*.py" not in asked["someone/tiny-llama"]["allow_patterns"]
    )


def broken(tiny_folder, tmp_path, **config):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_folder, tmp_path):
    folder = broken(tiny_folder, tmp_path, attention_bias=True, mlp_bias=True)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "layers.2.input_layernorm" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(SteerError, match=r"lacks weights.*model\.layers\.2\.input_layernorm\.weight.*random"):
        steer.load(folder)


def test_refusals_come_before_any_weight_is_read(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_weights", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(SteerError, match="no anatomy record"):
        steer.load(broken(tiny_folder, tmp_path / "a", model_type="novel"))
    with pytest.raises(SteerError, match="no tensor"):
        steer.load(broken(tiny_folder, tmp_path / "b", num_hidden_layers=6))
    folder = broken(tiny_folder, tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SteerError, match="pickle"):
        steer.load(folder)
    with pytest.raises(SteerError, match="no anatomy record"):
        steer.load(tiny_folder("llama"), anatomy=tmp_path / "missing.yaml")


def test_remote_code_is_never_run(tiny_folder, tmp_path):
    folder = broken(tiny_folder, tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    steer.load(folder)
    assert not marker.exists()


def test_a_folder_without_a_tokenizer_loads_without_marks(tiny, tmp_path):
    hf, _ = tiny("llama")
    hf.save_pretrained(tmp_path)
    model = steer.load(tmp_path)
    assert model.tokenizer is None and not model.marks.exist
