"""What a server may be asked to steer: what its folder needs at start, and what `--declare` adds for later files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from steer.anatomy.resolve import Anatomy
from steer.backends.vllm.lowering import HIDDEN, Place
from steer.errors import SteerError
from steer.prompts import render

KINDS = {**dict.fromkeys(HIDDEN, ("add", "project")), "router": ("scale",), "router_logits": ("bias",)}
ALL = "all"


def declared(texts: Iterable[str], anatomy: Anatomy) -> tuple[Place, ...]:
    """Read `--declare`: `all`, or SITE or SITE:LAYERS such as resid_post:0-5,9.

    Raises:
        SteerError: an unknown site, a layer that is not there, or one without experts.
    """
    return tuple(sorted({place for text in texts for place in _declared(text, anatomy)}))


def _declared(text: str, anatomy: Anatomy) -> list[Place]:
    if text == ALL:
        return [place for site in KINDS for place in _at(site, _layers(site, anatomy))]
    site, _, wanted = text.partition(":")
    if site not in KINDS:
        raise SteerError(f"{text!r} was to be declared", f"{ALL}, or one of {', '.join(KINDS)}, with :LAYERS behind it")
    there = _layers(site, anatomy)
    layers = _numbers(wanted, text) if wanted else there
    missing = [layer for layer in layers if layer not in there]
    if missing or not layers:
        found = f"layer {missing[0]}" if missing else "no layer"
        raise SteerError(f"{text!r} names {found}", f"layers of this model that have {site}", "Choose other layers")
    return _at(site, layers)


def _at(site: str, layers: Sequence[int]) -> list[Place]:
    return [(site, kind, layer) for kind in KINDS[site] for layer in layers]


def _layers(site: str, anatomy: Anatomy) -> tuple[int, ...]:
    if site == "resid_pre":
        return (0,)
    return anatomy.expert_layers if site.startswith("router") else tuple(range(anatomy.layers))


def _numbers(text: str, whole: str) -> list[int]:
    found: set[int] = set()
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", word)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise SteerError(f"{whole!r} was to be declared", "layers such as 3, or 0-5, or 0-5,9")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def endings(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Return what the chat template appends for a reply, as tokens: as it comes, and with thinking on and off.

    Empty where the tokenizer has no template.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return ()
    message = [{"role": "user", "content": "a"}]
    found = {_ending(tokenizer, message, None)}
    try:
        found |= {_ending(tokenizer, message, thinking) for thinking in (True, False)}
    except SteerError:  # The template has no switch.
        return tuple(sorted(found))
    return tuple(sorted(found))


def _ending(tokenizer: Any, message: list[dict[str, str]], thinking: bool | None) -> tuple[int, ...]:
    rendered = render(tokenizer, message, thinking)
    return rendered.token_ids[rendered.generation_prompt_start :]
