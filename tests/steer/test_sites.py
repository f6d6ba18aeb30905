"""The names of places, held to the table of the design."""

from __future__ import annotations

import pytest

from steer.errors import SteerError
from steer.sites import SITES, site


def test_the_sites_stand_in_the_order_of_the_forward_pass():
    expected = ["resid_pre", "z", "head_out", "attn_raw", "attn_out", "resid_mid", "router_logits", "router", "mlp_raw", "mlp_out", "resid_post"]  # fmt: skip
    assert list(SITES) == expected
    assert [found.order for found in SITES.values()] == sorted({found.order for found in SITES.values()})


def test_only_z_is_per_head_and_only_heads_and_routers_are_no_tensor():
    assert [name for name, found in SITES.items() if found.per_head] == ["z"]
    assert [name for name, found in SITES.items() if not found.readable] == ["head_out", "router"]
    assert [name for name, found in SITES.items() if found.routing] == ["router_logits", "router"]


@pytest.mark.parametrize("name", ["", "resid", "Z", "routers", "hook_resid_mid"])
def test_an_unknown_site_is_refused_with_the_list(name):
    with pytest.raises(SteerError, match="resid_pre, z, head_out"):
        site(name)
