"""GGUF files that must be refused, each by name; the real file is read in the `real` lane."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer import gguf
from steer.errors import SteerError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, architecture):
    writer = GGUFWriter(str(path), architecture)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_of(pieces, split):
    words = Tokenizer(
        models.WordLevel({piece: n for n, piece in enumerate(["<unk>", *sorted(pieces)])}, unk_token="<unk>")
    )
    words.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def nothing_left(tmp_path):
    return not list((tmp_path / "cache").rglob("*.partial")) and not list((tmp_path / "cache").rglob("config.json"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SteerError, match="There is no file"):
        gguf.materialise(tmp_path / "none.gguf")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"PK\x03\x04 not what it says")
    with pytest.raises(SteerError, match="begins with"):
        gguf.materialise(path)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2", "mamba"])
def test_other_architectures_are_refused_by_name(tmp_path, architecture):
    path = write(tmp_path / "model.gguf", architecture)
    with pytest.raises(SteerError, match=f"architecture '{architecture}'.*Use the model's safetensors"):
        gguf.materialise(path)
    assert nothing_left(tmp_path)


def test_a_cut_file_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf", "llama")
    whole = path.read_bytes()
    assert len(GGUFReader(str(path)).tensors) == 1
    path.write_bytes(whole[:100])
    with pytest.raises(SteerError, match="no whole GGUF file"):
        gguf.materialise(path)
    assert nothing_left(tmp_path)


def test_special_tokens_come_from_the_file():
    tokenizer = tokenizer_of({"a", "b", "c"}, pre_tokenizers.WhitespaceSplit())
    gguf._name_special_tokens(tokenizer, {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 3})
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("a", "c", "c")
    gguf._name_special_tokens(tokenizer, {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.padding_token_id": 2})
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("c", "b")


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    words = {word for text in gguf.TEXTS for word in text.split()}
    tokenizer = tokenizer_of(words, pre_tokenizers.WhitespaceSplit())  # Forgets how many spaces there were.
    with pytest.raises(SteerError, match="same text after encoding and decoding"):
        gguf._check_tokenizer(tokenizer, tmp_path / "model.gguf")


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    from tokenizers import decoders

    characters = tokenizer_of({c for text in gguf.TEXTS for c in text}, pre_tokenizers.Split("", "isolated"))
    characters.backend_tokenizer.decoder = decoders.Fuse()
    with pytest.raises(SteerError, match="its merges were lost"):
        gguf._check_tokenizer(characters, tmp_path / "model.gguf")


def test_a_model_that_knows_no_english_is_refused(tmp_path, tiny):
    model, tokenizer = tiny("llama")
    with pytest.raises(SteerError, match="the loss of guessing"):
        gguf._check_loss(model, tokenizer, tmp_path / "model.gguf")
