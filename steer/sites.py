"""Sites: the places in a model that can be read and written (DESIGN §2).

| site | what it is | shape per token |
|---|---|---|
| `resid_pre` | the residual stream before a layer | hidden |
| `resid_mid` | after attention was added, before the MLP | hidden |
| `resid_post` | after the layer | hidden |
| `z` | input of the attention output projection | heads, head width |
| `head_out` | `W_O[:, h] z_h`, one head's write; never materialised | hidden |
| `attn_raw`, `mlp_raw` | what the output projection returns | hidden |
| `router_logits` | what experts are chosen by | experts |
| `router` | the chosen experts and their weights, see `steer.routing.Routing` | chosen |
| `attn_out`, `mlp_out` | what is added to the residual, after post-norm and multiplier | hidden |
"""

from __future__ import annotations

from dataclasses import dataclass

from steer.errors import SteerError


@dataclass(frozen=True)
class Site:
    """One place in every layer.

    Attributes:
        name: the word used in code, command line, files and documents.
        order: rank in the forward pass of a layer; writes happen in this order.
        per_head: whether values have shape (heads, head width) instead of (hidden,).
        readable: whether its value exists as one tensor; `head_out` is never materialised, `router` is two tensors.
        routing: whether it is about the choice of experts, so that no vector of the stream belongs there.
    """

    name: str
    order: int
    per_head: bool = False
    readable: bool = True
    routing: bool = False

    @property
    def has_vectors(self) -> bool:
        """Whether a token has one vector there, of the stream or per head, to be averaged, added or projected out."""
        return self.readable and not self.routing


_ALL = (
    Site("resid_pre", 0),
    Site("z", 1, per_head=True),
    Site("head_out", 2, readable=False),
    Site("attn_raw", 3),
    Site("attn_out", 4),
    Site("resid_mid", 5),
    Site("router_logits", 6, routing=True),
    Site("router", 7, readable=False, routing=True),
    Site("mlp_raw", 8),
    Site("mlp_out", 9),
    Site("resid_post", 10),
)
SITES: dict[str, Site] = {site.name: site for site in _ALL}


def site(name: str) -> Site:
    """Return the site called `name`.

    Raises:
        SteerError: there is no such site.
    """
    if name not in SITES:
        raise SteerError(
            f"there is no site {name!r}",
            f"one of {', '.join(SITES)}",
            "See `steer inspect MODEL` for the sites of a model",
        )
    return SITES[name]
