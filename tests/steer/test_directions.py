from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from steer import artifacts
from steer.directions import Direction, unit_vector
from steer.identity import ModelIdentity
from steer.ranges import ranges
from tests.steer.made import SEEDS, direction, identity, refused

FACTORS = st.floats(-1e3, 1e3)
SITES = st.sampled_from(["resid_mid", "z"])


def array(d: Direction) -> np.ndarray:
    """The vectors in float64, as an oracle wants them."""
    return d.vectors.double().numpy()


# Arithmetic.


@given(SEEDS, SITES, FACTORS, FACTORS)
def test_sums_and_multiples_are_numpys(seed: int, site: str, a: float, b: float) -> None:
    d, e = direction(seed, site=site), direction(seed + 1, site=site)
    np.testing.assert_allclose(
        array(d * a + b * e), a * array(d) + b * array(e), rtol=1e-5, atol=1e-5 * (1 + abs(a) + abs(b))
    )
    np.testing.assert_array_equal(array(-d), -array(d))
    np.testing.assert_array_equal(array(d - e), (array(d) - array(e)).astype(np.float32))


@given(SEEDS, SITES)
def test_a_direction_minus_itself_is_zero_and_halves_add_up(seed: int, site: str) -> None:
    d = direction(seed, site=site)
    assert not (d - d).vectors.any()
    assert d * 0.5 + d * 0.5 == d
    assert d.__neg__().__neg__() == d
    assert d * 1 == d


@given(SEEDS, SITES)
def test_unit_has_norm_one_and_the_same_way(seed: int, site: str) -> None:
    d = direction(seed, site=site)
    norms = np.linalg.norm(array(d.unit()), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    np.testing.assert_allclose(array(d.unit()) * np.linalg.norm(array(d), axis=-1, keepdims=True), array(d), atol=1e-5)


@given(SEEDS, st.sampled_from([2.0, 0.25, 2.0**-40, 2.0**60]))
def test_unit_does_not_see_powers_of_two(seed: int, factor: float) -> None:
    d = direction(seed)
    assert torch.equal((d * factor).unit().vectors, d.unit().vectors)
    assert torch.equal((-d).unit().vectors, -d.unit().vectors)


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e30, 3e38])
def test_unit_of_tiny_and_huge_vectors(size: float) -> None:
    v = unit_vector(torch.tensor([3.0, 4.0]).double().mul(size / 5).float())
    np.testing.assert_allclose(v.numpy(), [0.6, 0.8], rtol=1e-4)
    assert v.dtype == torch.float64


@given(SEEDS, SITES)
def test_cosine_is_the_textbooks(seed: int, site: str) -> None:
    d, e = direction(seed, site=site), direction(seed + 1, site=site)
    found = d.cosine(e)
    for row, layer in enumerate(d.layers):
        a, b = array(d)[row].ravel(), array(e)[row].ravel()
        assert math.isclose(found[layer], a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs_tol=1e-9)
    assert d.cosine(d * 3) == pytest.approx(dict.fromkeys(d.layers, 1.0))
    assert d.cosine(-d) == pytest.approx(dict.fromkeys(d.layers, -1.0))
    assert all(abs(value) <= 1 for value in d.cosine(d).values())


def test_norms_are_per_layer_over_all_heads() -> None:
    for site in ("resid_mid", "z"):
        d = direction(site=site)
        expected = [float(np.linalg.norm(row)) for row in array(d)]
        assert list(d.norms) == [1, 2, 5]
        assert list(d.norms.values()) == pytest.approx(expected)


# The control.


@given(SEEDS, SITES, st.integers(0, 10**6))
@settings(deadline=None)
def test_a_random_direction_has_equal_norms_and_no_other_likeness(seed: int, site: str, draw: int) -> None:
    d = direction(seed, site=site)
    r = d.random_like(draw)
    np.testing.assert_allclose(np.linalg.norm(array(r), axis=-1), np.linalg.norm(array(d), axis=-1), rtol=1e-5)
    assert list(r.norms.values()) == pytest.approx(list(d.norms.values()), rel=1e-5)
    assert (r.site, r.layers, r.model) == (d.site, d.layers, d.model)
    assert r == d.random_like(draw)
    assert r != d.random_like(draw + 1)
    assert (-d).random_like(draw) == r, "the draw must not depend on the vectors"


def test_random_directions_are_isotropic() -> None:
    d = Direction(torch.full((1, 8), 8**-0.5), (3,), "resid_post")
    drawn = np.concatenate([array(d.random_like(seed)) for seed in range(2000)])
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), np.eye(8) / 8, atol=0.02)


def test_the_draw_depends_on_the_layers_number_alone() -> None:
    d = direction(layers=(0, 3, 7))
    assert d.random_like(5).only([3, 7]) == d.only([3, 7]).random_like(5)
    rows = array(d.unit().random_like(5))
    assert abs(rows[0] @ rows[1]) < 0.999, "every layer has its own draw"


def test_a_layer_of_zeros_stays_zero() -> None:
    d = Direction(torch.zeros(1, 4), (0,), "resid_mid")
    assert not d.random_like(1).vectors.any()


# Refusals.


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (direction(site="resid_post"), ("resid_mid and resid_post",)),
        (direction(layers=(1, 2, 6)), ("1-2, 5 and 1-2, 6", "only")),
        (Direction(torch.ones(3, 8), (1, 2, 5), "resid_mid"), ("width", "(8,)")),
    ],
)
def test_what_does_not_fit_is_not_mixed(other: Direction, words: tuple[str, ...]) -> None:
    d = direction()
    for action in (lambda: d + other, lambda: d - other, lambda: d.cosine(other)):
        refused(action, *words)


@pytest.mark.parametrize("other", [identity("d" * 64, name="big"), identity(weights="d" * 64, name="big")])
def test_two_models_are_not_mixed(other: ModelIdentity) -> None:
    refused(lambda: direction(model=identity()) + direction(1, model=other), "tiny", "big", "model=None")
    meant = direction(model=identity()) + replace(direction(1, model=other), model=None)
    assert meant.model == identity()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_by_layer(bad: float) -> None:
    vectors = torch.ones(3, 4)
    vectors[1, 2] = bad
    refused(lambda: Direction(vectors, (2, 4, 9), "resid_mid"), "NaN or infinity", "layers 4")
    refused(lambda: direction() * bad, "finite")


def test_overflow_is_refused() -> None:
    refused(lambda: Direction(torch.ones(1, 4), (0,), "resid_mid") * 1e30 * 1e30, "infinity")
    refused(lambda: Direction(torch.full((1, 4), 1e300, dtype=torch.float64), (0,), "resid_mid"), "infinity")


@pytest.mark.parametrize("site", ["routers", "resid", "", "Z"])
def test_an_unknown_site_is_refused(site: str) -> None:
    refused(lambda: Direction(torch.ones(1, 4), (0,), site), "no site", "resid_post")


def test_a_direction_at_head_out_is_refused() -> None:
    refused(lambda: Direction(torch.ones(1, 4), (0,), "head_out"), "head_out", "attn_raw")


@pytest.mark.parametrize(
    ("shape", "layers", "site"),
    [
        ((2, 4), (0, 1), "z"),
        ((2, 3, 4), (0, 1), "resid_mid"),
        ((2, 0), (0, 1), "resid_mid"),
        ((0, 4), (), "resid_mid"),
        ((2, 4), (0,), "resid_mid"),
        ((2, 4), (0, 1, 2), "resid_mid"),
        ((2, 4), (1, 0), "resid_mid"),
        ((2, 4), (1, 1), "resid_mid"),
        ((2, 4), (-1, 0), "resid_mid"),
    ],
)
def test_shapes_and_layers_must_fit(shape: tuple[int, ...], layers: tuple[int, ...], site: str) -> None:
    refused(lambda: Direction(torch.ones(shape), layers, site), "direction")


def test_a_layer_it_lacks_is_refused() -> None:
    refused(lambda: direction()[3], "layer 3", "1-2, 5")
    refused(lambda: direction().only([1, 3]), "layer 3")
    refused(lambda: direction().only([]), "none of them 0")


def test_zero_vectors_are_named() -> None:
    z = direction(site="z")
    vectors = z.vectors.clone()
    vectors[1, 2] = 0
    refused(lambda: replace(z, vectors=vectors).unit(), "layer 2, head 2")
    plain = direction().vectors.clone()
    plain[2] = 0
    d = replace(direction(), vectors=plain)
    refused(d.unit, "layer 5", "only")
    refused(lambda: d.cosine(direction()), "layer 5")
    assert len(d.only([1, 2]).unit().layers) == 2


# Values.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_keeps_its_own_float32_copy(dtype: torch.dtype) -> None:
    given_vectors = torch.tensor([[1.0, 0.5]], dtype=dtype, requires_grad=True)
    d = Direction(given_vectors, (0,), "resid_mid")
    with torch.no_grad():
        given_vectors.zero_()
    assert d.vectors.dtype == torch.float32
    assert not d.vectors.requires_grad
    assert d[0].tolist() == [1.0, 0.5]


def test_equality_is_about_the_vectors_and_the_model() -> None:
    assert direction() == direction(provenance={"seed": 4})
    assert hash(direction()) == hash(direction(provenance={"seed": 4}))
    assert direction() != direction(model=identity())
    for other in (
        direction(1),
        direction(layers=(1, 2, 6)),
        direction(site="resid_post"),
        direction() * 1.0000001,
        direction().only([1, 2]),
    ):
        assert other.fingerprint != direction().fingerprint
        assert other != direction()
    assert direction() != "direction"


def test_only_takes_layers_in_any_order() -> None:
    d = direction()
    assert d.only([5, 1, 5]).layers == (1, 5)
    assert torch.equal(d.only([5])[5], d[5])
    assert d.only(d.layers) == d


# Files.


@settings(deadline=None, max_examples=25)
@given(SEEDS, SITES)
def test_a_file_gives_the_direction_back(tmp_path_factory: pytest.TempPathFactory, seed: int, site: str) -> None:
    d = direction(
        seed, site=site, model=identity(), provenance=artifacts.provenance(seed=3, data_count=9, options={"below": 100})
    )
    path = d.save(tmp_path_factory.mktemp("d") / "d.safetensors")
    again = Direction.load(path)
    assert again == d
    assert again.fingerprint == d.fingerprint
    assert (again.provenance["seed"], again.provenance["data_count"], again.provenance["options"]) == (
        3,
        9,
        {"below": 100},
    )
    assert Direction.load(again.save(path, overwrite=True)) == d


def test_arithmetic_tells_its_story(tmp_path: Path) -> None:
    d, e = direction(provenance=artifacts.provenance(data_count=9)), direction(1)
    total = Direction.load((d + e).save(tmp_path / "sum.safetensors"))
    assert total.provenance["parents"] == [d.fingerprint, e.fingerprint]
    assert "sum" in total.provenance["convention"]
    control = d.random_like(7)
    assert (control.provenance["seed"], control.provenance["parents"]) == (7, [d.fingerprint])
    assert "random" in control.provenance["convention"]


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    direction().save(tmp_path / "d.safetensors")
    assert torch.equal(load_file(tmp_path / "d.safetensors")["vectors"], direction().vectors)


def test_a_made_up_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    vectors = torch.ones(2, 4)
    good = {"site": "resid_mid", "content": {"layers": [0, 1]}}
    bad: list[tuple[dict[str, torch.Tensor], dict[str, object], str]] = [
        ({"v": vectors}, good, "lacks the vectors"),
        ({"vectors": vectors}, {"site": "resid_mid"}, "layers"),
        ({"vectors": vectors}, good | {"content": {"layers": [0, 1], "heads": []}}, "layers"),
        ({"vectors": vectors}, good | {"content": {"layers": ["0", "1"]}}, "layers"),
        ({"vectors": vectors}, good | {"content": {"layers": [0, True]}}, "layers"),
        ({"vectors": vectors}, good | {"content": {"layers": [0]}}, "2 vectors"),
        ({"vectors": vectors}, good | {"site": "router"}, "experts are chosen"),
        ({"vectors": vectors}, good | {"model": {"name": "x"}}, "model identity"),
        ({"vectors": vectors * math.nan}, good, "NaN"),
    ]
    for tensors, story, word in bad:
        artifacts.write(path, "direction", tensors, story, overwrite=True)
        refused(lambda: Direction.load(path), word)
    artifacts.write(path, "patch", {"vectors": vectors}, good, overwrite=True)
    refused(lambda: Direction.load(path), "kind 'patch'")


# The reader's view.


@pytest.mark.parametrize(
    ("numbers", "text"), [([], "none"), ([4], "4"), ([0, 1, 2, 3, 7], "0-3, 7"), ([1, 3, 5], "1, 3, 5")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_it_shows_itself() -> None:
    d = direction(model=identity())
    assert repr(d) == "Direction(site='resid_mid', layers=1-2, 5, width=12, model='tiny')"
    assert repr(direction(site="z")).endswith("width=3x5)")
    assert d._repr_html_().count("<tr>") == 4


def measured(layers: tuple[int, ...] = (1, 2, 5)) -> Direction:
    """A direction whose provenance tells the split-half cosine of `layers`."""
    told = {"splits": 4, "layers": list(layers), "mean": [0.9, 0.5, 0.1][: len(layers)]}
    told |= {"lower": [0.8, 0.4, -0.2][: len(layers)], "upper": [1.0, 0.6, 0.3][: len(layers)]}
    return direction(provenance=artifacts.provenance(options={"span": "thinking", "split_half": told}))


def test_its_table_has_norms_and_the_split_half_cosine_where_it_is_known() -> None:
    d = measured()
    frame = d.frame()
    assert list(frame.columns) == ["layer", "norm", "split_half_cosine"]
    assert list(frame["layer"]) == [1, 2, 5]
    np.testing.assert_allclose(frame["norm"], np.linalg.norm(array(d), axis=1))
    assert list(frame["split_half_cosine"]) == [0.9, 0.5, 0.1]
    assert list(measured((1, 2)).frame()["split_half_cosine"].isna()) == [False, False, True]
    assert list(direction(site="z").frame().columns) == ["layer", "norm"]


def test_multiples_and_cuts_keep_the_split_half_cosine_and_other_directions_do_not(tmp_path: Path) -> None:
    d = measured()
    again = Direction.load((d * -2.0).save(tmp_path / "d.safetensors"))
    assert again.halves == d.halves == {1: (0.9, 0.8, 1.0), 2: (0.5, 0.4, 0.6), 5: (0.1, -0.2, 0.3)}
    assert d.only([5]).halves == {5: (0.1, -0.2, 0.3)}
    for other in (d.random_like(0), d + d, direction()):
        assert other.halves == {}
    broken: list[object] = [None, [], {"layers": [1]}]
    for told in broken:
        assert replace(d, provenance={"options": {"split_half": told}}).halves == {}


def test_it_draws_its_norms_and_the_cosine_where_it_is_known() -> None:
    d = measured()
    norms, cosines = d.plot().axes
    assert [bar.get_height() for bar in norms.patches] == pytest.approx(list(d.norms.values()))  # type: ignore[attr-defined]
    assert np.asarray(cosines.lines[0].get_ydata()).tolist() == [0.9, 0.5, 0.1]
    assert norms.get_title() == "Direction at resid_mid"
    assert len(d.random_like(0).plot().axes) == 1
