from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer import wrap
from steer.directions import Direction
from steer.interventions import Add, ProjectOut
from steer.patches import Patch, ProjectColumns
from steer.scores import HeadScores
from steer.steering import Steering
from steer.subjects import Subject, load_change, open_engine, open_subject, parse
from tests import tiny
from tests.steer import lora
from tests.steer.made import refused

NAMES = st.text("abcXYZ019._-/", min_size=1).filter(lambda name: name.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a steering, a patch and things that are no change beside it."""
    root = tmp_path_factory.mktemp("subject")
    model, tokenizer = tiny.build("qwen3")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    d = Direction(torch.linspace(-1, 1, 96).reshape(2, 48), (1, 3), "resid_mid")
    Steering((Add(d, "attn_out", 2.0),), name="push").save(root / "push.yaml")
    Patch((ProjectColumns(1, "attention_output", (0, 3), d[1]),)).save(root / "edit.safetensors")
    d.save(root / "d.safetensors")
    HeadScores(torch.ones(4, 4)).save(root / "scores.safetensors")
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text("{}")
    return root


# Text.


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("organism:chain", Subject("hf", "organism:chain")),
        ("vllm:organism:chain", Subject("vllm", "organism:chain")),
        ("owner/name", Subject("hf", "owner/name")),
        ("m+a.yaml", Subject("hf", "m", ((Path("a.yaml"), 1.0),))),
        ("m+a.yaml@0.5", Subject("hf", "m", ((Path("a.yaml"), 0.5),))),
        ("m+a.yaml@-2+b.safetensors", Subject("hf", "m", ((Path("a.yaml"), -2.0), (Path("b.safetensors"), 1.0)))),
        ("vllm:m+a.yaml@0+a.yaml@1e-3", Subject("vllm", "m", ((Path("a.yaml"), 0.0), (Path("a.yaml"), 1e-3)))),
        ("m+runs@home/a.yaml", Subject("hf", "m", ((Path("runs@home/a.yaml"), 1.0),))),
        ("m+runs@home/a.yaml@3", Subject("hf", "m", ((Path("runs@home/a.yaml"), 3.0),))),
        ("m@main", Subject("hf", "m@main")),
    ],
)  # fmt: skip
def test_text_is_read(text: str, subject: Subject) -> None:
    assert parse(text) == subject


@given(st.sampled_from(["hf", "vllm"]), NAMES, st.lists(st.tuples(NAMES.map(Path), st.floats(-100, 100)), max_size=3))
def test_a_subject_says_itself(backend: str, name: str, changes: list[tuple[Path, float]]) -> None:
    written = [(path, c) for path, c in changes if not Path(str(path)).exists()]
    subject = Subject("vllm" if backend == "vllm" else "hf", name, tuple(written))
    if "e+" not in str(subject):
        assert parse(str(subject)) == subject


@pytest.mark.parametrize("text", ["", " ", "+a.yaml", "m+", "m++a.yaml", "vllm:", "vllm:+a.yaml"])
def test_an_empty_part_is_refused(text: str) -> None:
    refused(lambda: parse(text), "empty part", "MODEL")


@pytest.mark.parametrize("coefficient", ["x", "", "0,5", "nan", "inf", "-inf", "1e999"])
def test_a_coefficient_is_a_finite_number(coefficient: str) -> None:
    refused(lambda: parse(f"m+a.yaml@{coefficient}"), "coefficient", "@-0.5")


def test_paths_with_plus_and_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b.yaml", "b.yaml", "c@0.5", "x@1+y.yaml"):
        Path(name).write_text("")
    Path("mo+del").mkdir()
    Path("runs+lora").mkdir()
    assert parse("mo+del+a+b.yaml") == Subject("hf", "mo+del", ((Path("a+b.yaml"), 1.0),))
    assert parse("mo+del+a+b.yaml@2+b.yaml") == Subject(
        "hf", "mo+del", ((Path("a+b.yaml"), 2.0), (Path("b.yaml"), 1.0))
    )
    assert parse("m+c@0.5").changes == ((Path("c@0.5"), 1.0),)
    assert parse("m+c@0.5@0.25").changes == ((Path("c@0.5"), 0.25),)
    assert parse("m+x@1+y.yaml@-1").changes == ((Path("x@1+y.yaml"), -1.0),)
    assert parse("m+b.yaml@1e+2").changes == ((Path("b.yaml"), 100.0),)
    assert parse("m+runs+lora@0.5").changes == ((Path("runs+lora"), 0.5),)
    assert parse("runs+lora+b.yaml@2") == Subject("hf", "runs+lora", ((Path("b.yaml"), 2.0),))
    assert parse("m+none+b.yaml").changes == ((Path("none"), 1.0), (Path("b.yaml"), 1.0))


# Files.


def test_the_files_type_decides(folder: Path) -> None:
    assert isinstance(load_change(folder / "push.yaml"), Steering)
    assert isinstance(load_change(folder / "edit.safetensors"), Patch)
    assert isinstance(load_change(lora.attention(folder / "adapter")), Patch)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d.safetensors", ("kind 'direction'", "Steering((Add(")),
        ("scores.safetensors", ("kind 'scores'", "steer patch thinkedit")),
        ("lora", ("method None", "LORA")),
        ("push.safetensors", ("push.yaml",)),
        ("none.yaml", ("no file",)),
        ("model", ("adapter_config.json", "MODEL")),
        ("model/model.safetensors", ("without our provenance",)),
    ],
)
def test_what_is_no_change_is_refused(folder: Path, name: str, words: tuple[str, ...]) -> None:
    refused(lambda: load_change(folder / name), *words)
    refused(lambda: open_subject(f"{folder / 'model'}+{folder / name}"), *words)


def test_files_are_read_before_the_model_is_loaded(folder: Path) -> None:
    refused(lambda: open_subject(f"{folder / 'nowhere'}+{folder / 'none.yaml'}"), "none.yaml")


# Running.


def test_vllm_is_refused_where_activations_are_wanted(folder: Path) -> None:
    refused(lambda: open_subject("vllm:m+a.yaml@0.5"), "asks for vLLM", "'m+a.yaml@0.5'")


def test_an_engine_needs_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.backends.vllm.start.find_spec", lambda name: None)
    refused(lambda: open_engine("vllm:m+a.yaml@0.5"), "vLLM is not installed", "pip install 'reasoning-steer[vllm]'")


def logits(text: str) -> torch.Tensor:
    return open_subject(text).run([[5, 9, 14, 22]])[0]


def test_a_subject_does_what_its_parts_do(folder: Path) -> None:
    base, push, edit = folder / "model", folder / "push.yaml", folder / "edit.safetensors"
    plain = open_subject(str(base))
    assert plain.changes == ()
    with plain.steered(Steering.load(push), 0.5):
        expected = plain.run([[5, 9, 14, 22]])[0]
    assert torch.equal(logits(f"{base}+{push}@0.5"), expected)
    with Patch.load(edit).on(plain), plain.steered(Steering.load(push)):
        both = plain.run([[5, 9, 14, 22]])[0]
    assert torch.equal(logits(f"{base}+{edit}+{push}"), both)
    assert not torch.equal(expected, plain.run([[5, 9, 14, 22]])[0])


def test_coefficient_zero_is_bit_identical(folder: Path) -> None:
    base = folder / "model"
    plain = logits(str(base))
    assert torch.equal(plain, logits(f"{base}+{folder / 'push.yaml'}@0"))
    assert torch.equal(plain, logits(f"{base}+{folder / 'edit.safetensors'}@0"))


def test_the_order_of_changes_is_kept(folder: Path) -> None:
    view = open_subject(f"{folder / 'model'}+{folder / 'push.yaml'}@2+{folder / 'edit.safetensors'}@0.5")
    assert [(type(change).__name__, c) for change, c in view.changes] == [("Steering", 2.0), ("Patch", 0.5)]


def test_a_change_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = Direction(torch.ones(1, 8), (0,), "resid_mid")
    Steering((Add(wide, "attn_out"),)).save(tmp_path / "wide.yaml")
    view = open_subject(f"{folder / 'model'}+{tmp_path / 'wide.yaml'}")
    refused(lambda: view.run([[5]]), "(8,)", "(48,)")


def test_hook_and_patch_subjects_agree(folder: Path, tmp_path: Path) -> None:
    patch = Patch.load(folder / "edit.safetensors")
    patch.steering().save(tmp_path / "hook.yaml")
    assert isinstance(patch.steering().interventions[0], ProjectOut)
    difference = logits(f"{folder / 'model'}+{tmp_path / 'hook.yaml'}") - logits(
        f"{folder / 'model'}+{folder / 'edit.safetensors'}"
    )
    assert float(difference.abs().max()) < 1e-5


def test_without_a_tokenizer_on_disk_a_wrapped_model_still_takes_changes() -> None:
    model = wrap(tiny.build("qwen3").model, self_check=False)
    d = Direction(torch.ones(1, 48), (0,), "resid_mid")
    view = model.with_(Steering((Add(d, "attn_out"),)), coefficient=0.5)
    assert len(view.changes) == 1
