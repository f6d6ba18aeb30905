"""ThinkEdit from direction and heads to a patch; hook, memory and disk against a hook written by hand (thinkedit.md §1.9)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import edits
import steer
from edits.thinkedit import gain, thinkedit
from steer.directions import Direction
from steer.errors import SteerError
from steer.operations import ProjectColumns
from steer.patches import Patch
from steer.scores import HeadScores
from tests import tiny
from tests.edits.material import FAMILIES, attention_output, matrix

Folder = Callable[..., Path]
LAYERS, HIDDEN, HEADS = 4, 48, 4
CHOSEN = ((2, 3), (0, 1), (2, 0))
NORMED = ("gemma2", "gemma3_text", "olmo2")
IDS = [[7, 9, 11, 13, 15, 17, 19, 21], [30, 31, 32]]


def direction(seed: int = 0, **given: Any) -> Direction:
    vectors = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, tuple(range(LAYERS)), "resid_mid", **given)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector.double() / vector.double().norm()


class ByHand:
    """o -= w (o_h · v̂) v̂ for every chosen head, as the paper says it of activations, in float64.

    Written without our code: each head's write is materialised by zeroing the other heads.
    """

    def __init__(
        self, model: Any, heads: Sequence[tuple[int, int]], vectors: dict[int, torch.Tensor], weight: float = 1.0
    ) -> None:
        self.model, self.heads, self.vectors, self.weight = model, heads, vectors, weight

    def __enter__(self) -> None:
        self.stack = ExitStack()
        for layer in sorted({layer for layer, _ in self.heads}):
            projection = self.model.model.layers[layer].self_attn.o_proj
            handle = projection.register_forward_hook(self._hook(layer))
            self.stack.callback(handle.remove)

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _hook(self, layer: int) -> Callable[..., torch.Tensor]:
        v = unit(self.vectors[layer])

        def hook(module: torch.nn.Linear, given: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            z, result = given[0].double(), output.double()
            width = z.shape[-1] // HEADS
            for head in [head for at, head in self.heads if at == layer]:
                alone = torch.zeros_like(z)
                alone[..., head * width : (head + 1) * width] = z[..., head * width : (head + 1) * width]
                written = alone @ module.weight.double().T
                result = result - self.weight * (written @ v)[..., None] * v
            return result.to(output.dtype)

        return hook


@pytest.mark.parametrize("family", FAMILIES)
def test_hook_memory_and_disk_do_what_the_paper_does_to_activations(
    tiny_folder: Folder, tmp_path: Path, family: str
) -> None:
    model = steer.load(tiny_folder(family), self_check=False)
    d = direction()
    patch = thinkedit(d, CHOSEN, model=model)
    done = patch.plan(model.path).apply(tmp_path / "out")  # type: ignore[arg-type]
    plain = model.run(IDS)
    with ByHand(model.hf, CHOSEN, {layer: d[layer] for layer in range(LAYERS)}):
        expected = model.run(IDS)
    moved = max(float((a - b).abs().max()) for a, b in zip(plain, expected, strict=True))
    assert moved > 1e-2, "an edit that does nothing would agree with everything"
    with model.steered(patch.steering()):
        hook = model.run(IDS)
    memory, disk = model.with_(patch).run(IDS), steer.load(done.path, self_check=False).run(IDS)
    for form in (hook, memory, disk):
        for a, b in zip(form, expected, strict=True):
            assert float((a - b).abs().max()) <= 1e-4
    for form in (model.with_(patch), model.with_(patch.steering())):
        found = edits.verify(form, done)
        assert found.passed and found.bytes_equal and found.floor is not None and found.tolerance == 3 * found.floor, (
            str(found)
        )


MORE = ("deepseek_v3", "gpt_oss", "glm4", "olmo3", "gemma4_text", "qwen3_next", "mixtral", "granitemoe")


@pytest.mark.parametrize("family", MORE)
def test_heads_of_wide_values_biases_norms_and_experts_are_edited_alike(family: str) -> None:
    """DeepSeek's values have a width of their own, the bias of gpt_oss stays, Qwen3-Next has heads in some layers."""
    model = steer.wrap(*tiny.build(family), self_check=False)
    heads = ((1, 3), (3, 0), (3, 2))
    patch, plain = thinkedit(direction(), heads, 0.7, model=model), model.run(IDS)
    with ByHand(model.hf, heads, {layer: direction()[layer] for layer in range(LAYERS)}, 0.7):
        expected = model.run(IDS)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, expected, strict=True)) > 1e-3
    biases = {name: tensor.clone() for name, tensor in model.hf.state_dict().items() if "bias" in name}
    with patch.on(model):
        assert all(torch.equal(model.hf.state_dict()[name], tensor) for name, tensor in biases.items())
    for form in (patch, patch.steering()):
        found = model.with_(form).run(IDS)
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "olmo2", "qwen3_moe"])
def test_overlapping_patches_compose_as_their_hooks_do(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    """Heads that both patches name see the second direction taken out of what the first one left."""
    model = steer.load(tiny_folder(family), self_check=False)
    first, second = thinkedit(direction(0), CHOSEN, 0.7), thinkedit(direction(1), [(2, 3), (2, 1)])
    both = Patch((*first.operations, *second.operations))
    done = both.plan(model.path).apply(tmp_path / "out")  # type: ignore[arg-type]
    views = [
        model.with_(both),
        model.with_(both.steering()),
        model.with_(first, second),
        model.with_(first.steering(), second.steering()),
        model.with_(first, second.steering()),
    ]
    for view in views:
        assert edits.verify(view, done).passed, str(edits.verify(view, done))
    swapped = model.with_(Patch((*second.operations, *first.operations)))
    assert not edits.verify(swapped, done).passed, "the order of overlapping projections matters"


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 2.0, -1.0])
def test_coefficient_means_the_same_in_every_form(tiny_folder: Folder, coefficient: float) -> None:
    model = steer.load(tiny_folder("qwen3"), self_check=False)
    patch = thinkedit(direction(), CHOSEN, 0.8)
    with ByHand(model.hf, CHOSEN, {layer: direction()[layer] for layer in range(LAYERS)}, 0.8 * coefficient):
        expected = model.run(IDS)
    for change in (patch, patch.steering()):
        found = model.with_(change, coefficient=coefficient).run(IDS)
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) <= 1e-4
    if coefficient == 0:
        plain = model.run(IDS)
        for change in (patch, patch.steering()):
            assert all(
                torch.equal(a, b) for a, b in zip(model.with_(change, coefficient=0).run(IDS), plain, strict=True)
            )


def test_the_result_does_not_depend_on_how_heads_and_direction_are_written() -> None:
    reference = thinkedit(direction(), CHOSEN)
    for heads in itertools.permutations(CHOSEN):
        assert thinkedit(direction(), list(heads)) == reference
    assert [(op.layer, op.heads) for op in reference.operations] == [(0, (1,)), (2, (0, 3))], "one operation per layer"
    model = steer.wrap(*tiny.build("qwen3"), self_check=False)
    with reference.on(model):
        expected = attention_output(model.hf, 2).clone()
    with thinkedit(-4 * direction(), CHOSEN).on(model):
        assert torch.equal(attention_output(model.hf, 2), expected)


def test_heads_come_from_scores() -> None:
    values = torch.arange(16.0).view(4, 4)
    assert thinkedit(direction(), HeadScores(values).top(2)).matrices.keys() == {matrix(3)}


# Families with a norm behind the projection.


@pytest.mark.parametrize("family", NORMED)
def test_the_gain_is_what_the_norm_multiplies_by(family: str) -> None:
    hf, tokenizer = tiny.build(family)
    model = steer.wrap(hf, tokenizer, self_check=False)
    weight = hf.model.layers[1].post_attention_layernorm.weight
    expected = 1 + weight if family.startswith("gemma") else weight
    measured = gain(model, 1)
    torch.testing.assert_close(measured / measured[0], (expected / expected[0]).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", NORMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_norm_nothing_is_left_along_the_direction(family: str, dtype: torch.dtype) -> None:
    """With all heads chosen, what is added to the stream has no component along v̂; without the option it has one."""
    model = steer.wrap(*tiny.build(family, dtype=dtype), self_check=False)
    heads = [(1, head) for head in range(HEADS)]
    v = unit(direction()[1])

    def along(patch: Patch | None) -> float:
        view = model if patch is None else model.with_(patch)
        with model.capture({"attn_out": [1]}) as acts:
            view.run(IDS[:1])
        return float((acts["attn_out"][1].double() @ v).abs().max())

    plain = along(None)
    through = along(thinkedit(direction(), heads, model=model, through_norm=True))
    assert through <= (1e-5 if dtype == torch.float32 else 3e-2) * plain
    assert along(thinkedit(direction(), heads, model=model)) > 0.1 * plain


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_without_such_a_norm_the_option_changes_nothing(family: str) -> None:
    model = steer.wrap(*tiny.build(family), self_check=False)
    plain, through = (thinkedit(direction(), CHOSEN, model=model, through_norm=flag) for flag in (False, True))
    assert plain == through and through.provenance["options"]["through_norm"] is True


# Refusals and provenance.


@pytest.mark.parametrize(
    ("heads", "word"),
    [([], "o heads"), ([(0, 1), (0, 1)], "twice"), ([(9, 0)], "ayer 9"), ([(0, -1)], "from 0")],
)
def test_senseless_heads_are_refused(heads: list[tuple[int, int]], word: str) -> None:
    with pytest.raises(SteerError, match=word):
        thinkedit(direction(), heads)


def test_a_model_is_checked_against_when_it_is_there() -> None:
    model = steer.wrap(*tiny.build("qwen3"), self_check=False)
    for heads, word in (([(0, 4)], "head 4"), ([(4, 0)], "ayer 4")):
        with pytest.raises(SteerError, match=word):
            thinkedit(direction(), heads, model=model)
    other = steer.wrap(*tiny.build("llama"), self_check=False).identity
    with pytest.raises(SteerError, match="made for"):
        thinkedit(direction(model=other), CHOSEN, model=model)
    with pytest.raises(SteerError, match="hidden"):
        thinkedit(Direction(torch.ones(4, 47), (0, 1, 2, 3), "resid_mid"), CHOSEN, model=model)


def test_heads_of_linear_attention_are_refused() -> None:
    model = steer.wrap(*tiny.build("qwen3_next"), self_check=False)
    assert 0 in model.anatomy.linear_layers
    with pytest.raises(SteerError, match="linear attention"):
        thinkedit(direction(), [(0, 1)], model=model)
    assert thinkedit(direction(), [(1, 1)], model=model).matrices.keys() == {matrix(1)}


def test_directions_that_cannot_serve_are_refused() -> None:
    with pytest.raises(SteerError, match="per head"):
        thinkedit(Direction(torch.ones(1, 4, 16), (0,), "z"), [(0, 1)])
    zero = direction().vectors.clone()
    zero[2] = 0
    with pytest.raises(SteerError, match="layer 2"):
        thinkedit(Direction(zero, (0, 1, 2, 3), "resid_mid"), CHOSEN)
    with pytest.raises(SteerError, match="model"):
        thinkedit(direction(), CHOSEN, through_norm=True)


def test_provenance_tells_where_the_patch_came_from() -> None:
    identity = steer.wrap(*tiny.build("qwen3"), self_check=False).identity
    made = thinkedit(direction(model=identity, provenance={"data_count": 12, "seed": 3}), CHOSEN, 0.5)
    assert made.model == identity
    story = made.provenance
    assert (story["site"], story["data_count"], story["seed"]) == ("resid_mid", 12, 3)
    assert story["options"]["heads"] == [[2, 3], [0, 1], [2, 0]] and story["options"]["weight"] == 0.5
    assert story["parents"] == [direction(model=identity).fingerprint]
    assert all(isinstance(operation, ProjectColumns) and operation.weight == 0.5 for operation in made.operations)
