"""Captures: the last forward pass, or all of them."""

from __future__ import annotations

import torch

from steer.capture import Capture


def passes(capture, count, places=(("z", 0), ("z", 1), ("resid_post", 1))):
    for number in range(count):
        for site, layer in places:
            capture.take(site, layer, torch.tensor(float(number)), None)


def test_the_last_pass_is_kept():
    capture = Capture()
    passes(capture, 3)
    assert {site: {layer: value.item() for layer, value in values.items()} for site, values in capture.items()} == {
        "z": {0: 2, 1: 2},
        "resid_post": {1: 2},
    }
    assert capture.forwards == []


def test_every_pass_is_kept_apart():
    capture = Capture(every=True)
    passes(capture, 3)
    assert [passed["z"][1].item() for passed in capture.forwards] == [0, 1, 2]
    assert [passed["resid_post"][1].item() for passed in capture.forwards] == [0, 1, 2]
    assert all(set(passed) == {"z", "resid_post"} and set(passed["z"]) == {0, 1} for passed in capture.forwards)
    assert capture["z"][0].item() == 2


def test_nothing_read_is_an_empty_capture():
    assert dict(Capture()) == {} and Capture(every=True).forwards == []
