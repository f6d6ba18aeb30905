"""The proof at start in vLLM's own models: Granite multiplies what its blocks return, and whoever does not know is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.vllm import cases
from tests.vllm.lab import Bench

pytestmark = pytest.mark.vllm


def test_a_family_with_a_multiplier_is_steered_as_by_hooks(bench: Callable[[str], Bench]) -> None:
    made = bench("granite")
    assert {scale for _, scale in made.declared().parts.values()} == {0.22}
    asks = cases.batch(made)
    (steered,) = made.engine(asks).rounds
    made.check(asks, steered)


def test_a_multiplier_that_nobody_knows_stops_the_engine(bench: Callable[[str], Bench]) -> None:
    declared = bench("granite").declared()
    unknown = replace(declared, parts={site: (paths, 1.0) for site, (paths, _) in declared.parts.items()})
    with pytest.raises(
        pytest.fail.Exception, match=r"was written to at (attn|mlp)_out, and the stream after it moves by"
    ):
        bench("granite").engine([], additional_config=unknown.to_config())
