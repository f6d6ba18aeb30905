"""Tokenizer ids from the file equal those of the loaded tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steer import SteerError
from steer.identity import UNKNOWN, tokenizer_id
from steer.sources import BUILTIN
from steer.vocabulary import tokenizer_id_of

MODELS = {
    "bpe": models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
    "unigram": models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -2.0)], 0),
    "wordpiece": models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_tokenizer(tmp_path, kind):
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(MODELS[kind]))
    fast.add_special_tokens({"pad_token": "<pad>"})
    fast.add_tokens(["ünï", "</think>"])
    fast.save_pretrained(tmp_path)
    assert tokenizer_id_of(tmp_path) == tokenizer_id(fast) == tokenizer_id(AutoTokenizer.from_pretrained(tmp_path))


def test_the_organism_and_tiny_models(tiny_folder):
    for folder in (BUILTIN / "chain", tiny_folder("llama")):
        assert tokenizer_id_of(folder) == tokenizer_id(AutoTokenizer.from_pretrained(folder))


def test_no_file_and_a_damaged_file(tmp_path):
    assert tokenizer_id_of(tmp_path) == UNKNOWN
    for content in ("{", "{}", '{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(SteerError, match="no tokenizer file"):
            tokenizer_id_of(tmp_path)
