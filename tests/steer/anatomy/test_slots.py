"""A slot names the right bytes: a matrix changed in the file, and the same matrix changed in the loaded model, are one model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steer import SteerError
from steer.anatomy import read_headers, resolve
from steer.anatomy.headers import SINGLE
from steer.anatomy.slots import EXPERTS, WORDS, Matrix
from tests.tiny import FAMILIES, build

LAYOUTS = {"as published": True, "fused": False}
MIXED = (
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "mixtral",
    "granitemoe",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_moe_text",
)
SHARED = ("qwen2_moe", "deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_moe_text")


def of(folder):
    headers = read_headers(folder)
    return resolve(headers.config, headers.shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(family, layout)`: a folder; read only."""

    @cache
    def make(family, layout="as published"):
        folder = tmp_path_factory.mktemp(family)
        build(family).model.save_pretrained(folder, save_original_format=LAYOUTS[layout])
        return folder

    return make


def named(anatomy):
    """Every matrix that the words name, and the biases that go with them."""
    matrices = [matrix for word in WORDS for matrix in anatomy.matrices(word)]
    biases = [replace(each, bias=True) for each in matrices if anatomy.has_bias(each.module, each.layer, each.expert)]
    return matrices, biases


@pytest.mark.parametrize(
    ("family", "layout"), [(each, "as published") for each in FAMILIES] + [(each, "fused") for each in MIXED]
)
def test_an_edit_of_the_file_is_an_edit_of_the_model(saved, tmp_path, family, layout):
    anatomy = of(saved(family, layout))
    shutil.copytree(saved(family, layout), tmp_path / "edited")
    stored = {name: tensor.clone() for name, tensor in load_file(tmp_path / "edited" / SINGLE).items()}
    model = AutoModelForCausalLM.from_pretrained(saved(family, layout))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrices, biases = named(anatomy)
    for number, matrix in enumerate([*matrices, *biases]):
        disk, memory = anatomy.on_disk(matrix), anatomy.in_memory(matrix)
        there, here = disk.view(stored[disk.name]), memory.view(state[memory.name])
        assert torch.equal(there, here), matrix
        assert (
            tuple(there.shape)
            == disk.shape(tuple(stored[disk.name].shape))
            == memory.shape(tuple(state[memory.name].shape))
        )
        change = torch.linspace(-1, 1, there.numel()).reshape(there.shape) * (number + 1)
        for each in (there, here):
            each[: there.shape[0] // 2 + 1] += change[: there.shape[0] // 2 + 1]
    save_file(stored, tmp_path / "edited" / SINGLE, metadata={"format": "pt"})
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").state_dict()
    assert edited.keys() == state.keys()
    for name, tensor in edited.items():
        expected = state["model.embed_tokens.weight"] if anatomy.tied and name == "lm_head.weight" else state[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_those_of_the_model(saved, family):
    model, anatomy = build(family).model, of(saved(family))
    layers = model.model.layers
    experts = [
        number for number, layer in enumerate(layers) if any("experts" in name for name, _ in layer.named_modules())
    ]
    linear = [number for number, layer in enumerate(layers) if hasattr(layer, "linear_attn")]
    assert (list(anatomy.expert_layers), list(anatomy.linear_layers)) == (experts, linear)
    assert bool(experts) == (family in MIXED) == (anatomy.experts == 4)
    count = {word: len(anatomy.matrices(word)) for word in WORDS}
    assert count["attention_output"] == 4 and count["mlp_output"] == 4 - len(experts)
    assert all(count[word] == 4 * len(experts) for word in EXPERTS) and count["router"] == len(experts)
    assert count["shared_expert_output"] == len(experts) * (family in SHARED)
    assert count["embedding"] == 1 and count["head"] == (not anatomy.tied)
    for word in WORDS:
        for matrix in anatomy.matrices(word):
            rows, columns = anatomy.in_memory(matrix).shape(
                tuple(model.get_parameter(anatomy.in_memory(matrix).name).shape)
            )
            hidden = {"head": columns, "router": columns, "expert_gate": columns, "expert_up": columns}.get(word, rows)
            assert hidden == anatomy.hidden, matrix
    assert [anatomy.matrices(word) for word in WORDS] == [tuple(sorted(anatomy.matrices(word))) for word in WORDS]


@pytest.mark.parametrize(
    ("family", "matrix", "words"),
    [
        ("qwen3_moe", Matrix(1, "mlp_output"), "layer 1 of this qwen3_moe model has experts"),
        ("qwen3_moe", Matrix(0, "expert_down", 0), r"layer 0 of this qwen3_moe model has no expert_down.*\[1, 3\]"),
        ("qwen3_moe", Matrix(1, "expert_down", 4), "layer 1, expert 4, expert_down was named; expected experts 0 to 3"),
        ("qwen3_moe", Matrix(1, "shared_expert_output"), "has no shared_expert_output"),
        ("qwen3_moe", Matrix(4, "attention_output"), "layers 0 to 3"),
        ("llama", Matrix(2, "router"), "layer 2 of this llama model has no router"),
        ("llama", Matrix(2, "expert_up", 0), "layer 2 of this llama model has no expert_up"),
        ("qwen3", Matrix(2, "attention_output", bias=True), "no output bias for layer 2, attention_output"),
        ("qwen3", Matrix(-1, "model.layers.9.x.weight"), "no tensor model.layers.9.x.weight"),
    ],
)
def test_what_is_not_there_is_refused_by_name(saved, family, matrix, words):
    anatomy = of(saved(family))
    with pytest.raises(SteerError, match=f"(?i){words}"):
        anatomy.on_disk(matrix)


def test_a_tied_head_is_the_embedding_on_disk_and_its_own_name_in_memory(saved):
    anatomy = of(saved("qwen2"))
    head, embedding = Matrix(-1, "head"), Matrix(-1, "embedding")
    assert anatomy.on_disk(head).name == anatomy.on_disk(embedding).name == "model.embed_tokens.weight"
    assert not anatomy.on_disk(head).transposed and anatomy.on_disk(embedding).transposed
    assert anatomy.in_memory(head).name == "lm_head.weight" and anatomy.matrices("head") == ()


def test_experts_are_counted_never_read_from_the_configuration(saved):
    headers = read_headers(saved("qwen3_moe"))
    anatomy = resolve({**headers.config, "num_experts": 128}, headers.shapes)
    assert (anatomy.experts, anatomy.expert_width) == (4, 24)
    fewer = {name: shape for name, shape in headers.shapes.items() if "layers.3.mlp.experts.3." not in name}
    with pytest.raises(SteerError, match="experts"):
        resolve(headers.config, fewer)


def test_a_quantised_expert_is_refused_by_name(saved):
    headers = read_headers(saved("gpt_oss"))
    packed = {
        name.replace("down_proj", "down_proj_blocks") if name.endswith("experts.down_proj") else name: shape
        for name, shape in headers.shapes.items()
    }
    with pytest.raises(SteerError, match="layer 1, expert 2, expert_down"):
        resolve(headers.config, packed).on_disk(Matrix(1, "expert_down", 2))


def test_headers_need_neither_torch_nor_long(saved):
    code = (
        "import sys, json; from steer.anatomy import read_headers, resolve; from steer.anatomy.slots import WORDS;"
        f"h = read_headers({str(saved('qwen3_next'))!r}); a = resolve(h.config, h.shapes);"
        "[(a.on_disk(m), a.in_memory(m)) for w in WORDS for m in a.matrices(w)];"
        "print(json.dumps([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
