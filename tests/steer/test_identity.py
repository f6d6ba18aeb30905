from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.identity import (
    UNKNOWN,
    ModelIdentity,
    canonical,
    check_same,
    check_tokenizer,
    digest,
    known_keys,
    mix,
    shape_id,
    tokenizer_id,
)
from tests import tiny
from tests.steer.made import identity, refused

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(JSON)
def test_canonical_json_reads_back(value: object) -> None:
    assert json.loads(canonical(value)) == value


@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_canonical_json_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    assert canonical(value) == canonical(dict(reversed(list(value.items()))))


def test_canonical_json_is_this_text() -> None:
    assert canonical({"b": [1, 0.1, None], "a": "ü"}) == '{"a":"ü","b":[1,0.1,null]}'


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_canonical_json_has_no_nan(number: float) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical({"a": number})


def test_digest_is_sha256_of_lengths_and_parts() -> None:
    assert digest([b"ab", b"c"]) == hashlib.sha256(b"\x02" + bytes(7) + b"ab" + b"\x01" + bytes(7) + b"c").hexdigest()


@given(st.lists(st.binary()), st.lists(st.binary()))
def test_digest_tells_lists_of_parts_apart(a: list[bytes], b: list[bytes]) -> None:
    assert (digest(a) == digest(b)) == (a == b)


def test_shape_id_depends_on_every_number_and_on_no_order() -> None:
    numbers: dict[str, object] = {"family": "llama", "layers": 4, "hidden": 48}
    assert shape_id(numbers) == shape_id(dict(reversed(list(numbers.items()))))
    for name in numbers:
        assert shape_id(numbers | {name: "other"}) != shape_id(numbers)


def test_tokenizer_id_is_about_ids_only() -> None:
    plain, changed = tiny.tokenizer(), tiny.tokenizer()
    changed.chat_template, changed.padding_side = "other", "left"
    changed(["so wait", "so"], padding=True)
    assert tokenizer_id(plain) == tokenizer_id(changed)
    changed.add_tokens(["zebra"])
    assert tokenizer_id(plain) != tokenizer_id(changed)


def test_tokenizer_id_survives_saving(tmp_path: object) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_id(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_id(tokenizer)


def test_an_identity_reads_back() -> None:
    assert ModelIdentity.from_dict(identity().to_dict()) == identity()


@pytest.mark.parametrize("change", [{"extra": "x"}, {"name": 3}, {"name": None}])
def test_an_identity_of_other_keys_is_refused(change: dict[str, object]) -> None:
    refused(lambda: ModelIdentity.from_dict({**identity().to_dict(), **change}), "model identity", "shape_id")


@pytest.mark.parametrize("data", [None, [], "tiny", {"name": "tiny"}])
def test_something_else_than_an_identity_is_refused(data: object) -> None:
    refused(lambda: ModelIdentity.from_dict(data), "model identity")


def test_another_shape_is_refused_by_both_names() -> None:
    refused(
        lambda: check_same(identity(name="here"), identity("d" * 64, name="there"), "the steering"),
        "the steering",
        "here",
        "there",
        "made for",
    )


def test_other_weights_earn_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"the steering was made from other weights.*here.*there"):
        check_same(identity(name="here"), identity(weights="d" * 64, name="there"), "the steering")


def test_unknown_weights_and_unknown_models_pass_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(identity(), identity(name="moved"), "it")
        check_same(identity(weights=UNKNOWN), identity(weights="d" * 64), "it")
        check_same(None, identity(), "it")
        check_same(identity(), None, "it")


def test_another_tokenizer_is_refused() -> None:
    refused(lambda: check_tokenizer("a" * 64, "b" * 64, "the run"), "the run", "another tokenizer", "from_text")
    check_tokenizer("a" * 64, "a" * 64, "the run")
    check_tokenizer(UNKNOWN, "a" * 64, "the run")


def test_mixing_keeps_what_is_known() -> None:
    vague = replace(identity(), weights_id=UNKNOWN)
    assert mix(None, None, "they") is None
    assert mix(None, identity(), "they") == mix(identity(), None, "they") == identity()
    assert mix(vague, identity(), "they") == mix(identity(), vague, "they") == identity()


@pytest.mark.parametrize("other", [identity("d" * 64), identity(weights="d" * 64)])
def test_mixing_models_is_refused(other: ModelIdentity) -> None:
    refused(lambda: mix(identity(), other, "the directions"), "the directions come from two models", "model=None")


def test_unknown_keys_are_named() -> None:
    refused(
        lambda: known_keys({"site": 1, "pahse": 2}, ("site", "phase"), "the file"), "'pahse'", "site, phase", "the file"
    )
    known_keys({"site": 1}, ("site", "phase"), "the file")


def test_nothing_here_imports_torch() -> None:
    code = "import sys, steer.identity, steer.files, steer.yaml_text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
